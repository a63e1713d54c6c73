import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tracking_cases import DRIVER_METRICS, make_config, make_group

from rlsys.config import SftConfig
from rlsys.tracking.composite import Progress
from rlsys.tracking.console import (
    PREFERENCE_COLUMNS,
    REWARD_MODEL_COLUMNS,
    LinesTracker,
    TerminalTracker,
    console_tracker,
)

SHOWN_IN_80_COLUMNS = ["1.367", "0.307", "667", "0.316", "0.0215", "-1.20e-03", "290.0", "1175"]


def step_metrics(step: int) -> dict[str, float | str]:
    return DRIVER_METRICS | Progress(400).metrics(step, 290.0)


def terminal(width: int, **options) -> tuple[TerminalTracker, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    return TerminalTracker(400, 4, options.get("first_step", 0), console), out


def lines_of(out: io.StringIO) -> list[str]:
    """What was written from the left edge on, without the codes that move the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines()


def test_without_a_terminal_a_step_is_one_plain_line(capsys):
    tracker = LinesTracker(400)
    tracker.log_metrics(
        0,
        {
            "eval/reward": 1.2,
            "eval/rewards/countdown/mean": 0.25,
            "eval/rewards/countdown/std": 0.4,
            "eval/completions/mean_length": 120.0,
        },
    )
    tracker.log_metrics(30, step_metrics(30))
    tracker.log_completions(31, make_group(["a", "b"]), None)
    tracker.close()
    evaluation, line = capsys.readouterr().out.splitlines()
    assert evaluation == "held-out after step 0 | reward 1.200 | countdown 0.250 | length 120"
    assert line.startswith("step 30/400 | reward 1.367 | std 0.307 | length 667 | clipped 0.316")
    assert "rollout 200.0s, policy_update 80.0s" in line
    assert line.endswith("left")
    assert line.isascii()
    assert line.isprintable()


def test_numbers_that_a_step_lacks_are_left_out_of_its_line(capsys):
    LinesTracker(4).log_metrics(1, {"reward": 1.0})
    assert capsys.readouterr().out == "step 1/4 | reward 1.000\n"


def test_80_columns_show_the_most_important_numbers():
    tracker, out = terminal(80)
    tracker.log_metrics(30, step_metrics(30))
    tracker.close()
    row = next(line for line in lines_of(out) if "30/400" in line)
    assert row.split() == ["30/400", *SHOWN_IN_80_COLUMNS]


@pytest.mark.parametrize("width", [30, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width):
    tracker, out = terminal(width)
    tracker.log_completions(1, make_group(["a", "b"]), None)
    for step in range(1, 25):
        tracker.log_metrics(step, step_metrics(step))
    tracker.close()
    assert max(map(len, lines_of(out))) <= width


def test_a_wide_terminal_shows_more_and_repeats_its_header():
    tracker, out = terminal(200)
    for step in range(1, 22):
        tracker.log_metrics(step, step_metrics(step))
    tracker.close()
    headers = [line for line in lines_of(out) if "zero-std" in line]
    assert len(headers) == 2
    assert "logp diff" in headers[0]


def test_the_bar_shows_the_activity_and_the_step_of_a_resumed_run():
    tracker, out = terminal(80, first_step=100)
    tracker.log_completions(101, make_group(["a", "b"]), None)
    tracker._live.refresh()
    tracker.close()
    text = "\n".join(lines_of(out))
    assert "100/400" in text
    assert "sampling: 1 of 4 groups" in text
    assert "stopped" in text


def test_a_pipe_gets_lines_and_columns_is_respected(monkeypatch, tmp_path):
    assert isinstance(console_tracker(make_config(tmp_path), None), LinesTracker)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tracking_cases import DRIVER_METRICS, make_config\n"
        "from rlsys.tracking.console import console_tracker\n"
        "tracker = console_tracker(make_config('run'), None)\n"
        "tracker.log_metrics(1, DRIVER_METRICS); tracker.close()\n"
    )
    here = str(Path(__file__).parents[1])
    monkeypatch.setenv("COLUMNS", "50")
    plain = subprocess.check_output([sys.executable, "-c", program, here], text=True)
    assert plain.startswith("step 1/60 | reward 1.367")
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich can tell
    monkeypatch.setenv("TERM", "xterm")
    bar = subprocess.check_output([sys.executable, "-c", program, here], text=True)
    widths = {len(line) for line in lines_of(io.StringIO(bar)) if "1/60" in line}
    assert max(widths) <= 50


SFT_METRICS: dict[str, float | str] = {
    **{"loss": 1.2345, "num_loss_tokens": 90.0, "grad_norm": 2.5, "learning_rate": 1e-5},
    **{"epoch": 0.25, "num_tokens": 900.0, "tokens_per_second": 1234.0, "time/step": 0.5},
    **{"time/data": 0.1, "time/policy_update": 0.4},
}


def sft_config(folder):
    data, model = {"dataset": ["rows.jsonl"]}, {"path": "model"}
    values = {"output_dir": str(folder), "max_steps": 4, "data": data, "model": model}
    return SftConfig.model_validate(values)


def test_a_supervised_step_has_columns_of_its_own(tmp_path, capsys):
    tracker = console_tracker(sft_config(tmp_path), None)
    held_out = {"eval/loss": 2.0, "eval/perplexity": 7.389, "eval/mean_token_accuracy": 0.5}
    tracker.log_metrics(0, held_out | {"eval/a/loss": 3.0, "eval/a/mean_token_accuracy": 0.25})
    tracker.log_metrics(1, SFT_METRICS)
    evaluation, line = capsys.readouterr().out.splitlines()
    assert evaluation == (
        "held-out after step 0 | loss 2 | perplexity 7.389 | accuracy 0.500 | a loss 3 | "
        "a accuracy 0.250"
    )
    assert line == (
        "step 1/4 | loss 1.2345 | s/step 0.50 | tok/s 1234 | grad 2.5 | lr 1e-05 | epoch 0.25 | "
        "policy_update 0.4s, data 0.1s"
    )


def test_a_supervised_run_trains_and_samples_nothing(tmp_path, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("rlsys.tracking.console.Console", lambda **options: console)
    tracker = console_tracker(sft_config(tmp_path), None)
    for step in range(1, 5):
        tracker.log_metrics(step, SFT_METRICS)
        if step == 3:
            tracker._live.refresh()
    tracker.close()
    shown = "\n".join(lines_of(out))
    assert "training | last step: policy_update 0.4s, data 0.1s" in shown
    assert "loss" in shown
    assert "sampling" not in shown
    assert "finished" in shown


def test_reward_models_show_accuracies_and_margins(capsys):
    tracker = LinesTracker(40, REWARD_MODEL_COLUMNS)
    tracker.log_metrics(0, {"eval/loss": 0.69, "eval/accuracy": 0.5, "eval/num_pairs": 7})
    tracker.log_metrics(0, {"eval/b/accuracy": 0.5, "eval/b/margin": 1.25})
    tracker.log_metrics(1, {"loss": 0.7, "accuracy": 0.75, "margin": 0.1})
    tracker.log_metrics(2, {"loss": 0.7, "mae": 0.75})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "held-out after step 0 | loss 0.69 | accuracy 0.500",
        "held-out after step 0 | b accuracy 0.500 | b margin 1.250",
        "step 1/40 | loss 0.7000 | accuracy 0.750 | margin 0.100",
        "step 2/40 | loss 0.7000",
    ]


def test_preference_training_shows_accuracies_and_margins(capsys):
    tracker = LinesTracker(40, PREFERENCE_COLUMNS)
    tracker.log_metrics(0, {"eval/loss": 0.69, "eval/rewards/accuracies": 0.5, "eval/kl": 0.1})
    tracker.log_metrics(0, {"eval/b/rewards/accuracies": 0.5, "eval/b/rewards/margins": 1.25})
    tracker.log_metrics(1, {"loss": 0.7, "rewards/accuracies": 0.75, "rewards/margins": 0.1})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "held-out after step 0 | loss 0.69 | accuracy 0.500",
        "held-out after step 0 | b accuracy 0.500 | b margin 1.250",
        "step 1/40 | loss 0.7000 | accuracy 0.750 | margin 0.100",
    ]
