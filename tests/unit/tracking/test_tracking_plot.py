import math

import pytest
from tracking_cases import DRIVER_METRICS

from rlsys.files import JsonlWriter
from rlsys.run.folder import RunDir
from rlsys.tracking.plot import load_series, plot_run, smoothed


def write_metrics(run: RunDir, *rows: dict) -> None:
    writer = JsonlWriter(run.metrics)
    writer.append(*rows)
    writer.close()


def test_a_run_with_gaps_and_nan_is_drawn_and_drawn_again(tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    run = RunDir(tmp_path)
    steps = [{"step": step, **DRIVER_METRICS, "remaining_time": "1s"} for step in range(1, 30)]
    steps[3] |= {"reward": math.nan, "kl": math.inf}
    write_metrics(run, {"step": 0, "eval/reward": 0.3}, *steps)
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 30, "rew')
    path = plot_run(tmp_path)
    first = matplotlib_image.imread(path)
    assert first.shape[:2] == (1350, 1350)
    assert first.std() > 0.05
    write_metrics(run, {"step": 31, "reward": 3.0})
    second = matplotlib_image.imread(plot_run(tmp_path))
    assert (first != second).any()
    assert {item.name for item in tmp_path.iterdir()} == {"metrics.jsonl", "reward_curve.png"}


@pytest.mark.parametrize(
    "row", [{"step": 1, "reward": 1.0}, {"step": 0, "eval/reward": 0.3}, {"step": 1, "kl": 0.0}]
)
def test_few_numbers_are_enough(tmp_path, row):
    write_metrics(RunDir(tmp_path), row)
    assert plot_run(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_supervised_run_is_a_loss_curve(tmp_path):
    own = {"grad_norm": 1.0, "learning_rate": 1e-5}
    steps = [{"step": step, "loss": 3.0 / step, **own} for step in range(1, 30)]
    held_out = {"step": 0, "eval/loss": 3.1, "eval/perplexity": 22.0, "eval/other/loss": 4.0}
    write_metrics(RunDir(tmp_path), held_out)
    first = plot_run(tmp_path)
    assert first.name == "loss_curve.png"
    before = first.read_bytes()
    write_metrics(RunDir(tmp_path), *steps, {**held_out, "step": 20})
    assert plot_run(tmp_path).read_bytes() != before
    assert {item.name for item in tmp_path.iterdir()} == {"metrics.jsonl", "loss_curve.png"}


def test_a_run_without_steps_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no run that took a step"):
        plot_run(tmp_path)
    write_metrics(RunDir(tmp_path))
    with pytest.raises(ValueError, match="wait for the first step"):
        plot_run(tmp_path)


def test_series_are_in_order_of_steps_and_the_last_value_of_a_step_counts():
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": None, "text": "x"}, {"step": 2, "a": 5.0}]
    series = load_series(rows)
    assert list(series) == ["a"]
    assert list(series["a"]) == [1, 2]
    assert math.isnan(series["a"][1])
    assert series["a"][2] == 5.0


def test_smoothing_is_the_mean_of_the_steps_so_far_within_the_window():
    series = {0: 1.0, 1: 3.0, 2: math.nan, 3: 5.0}
    assert smoothed(series, 2) == {0: 1.0, 1: 2.0, 2: 3.0, 3: 5.0}
