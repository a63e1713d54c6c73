import json
import math

import pytest
import torch
from tracking_cases import DRIVER_METRICS, LOG_LINE_KEYS, make_config, make_group

from rlsys.config import Config
from rlsys.files import read_jsonl
from rlsys.rotation import parts
from rlsys.run.folder import RunDir
from rlsys.tracking import Tracker, build_tracker, packages, register_tracker, trackers
from rlsys.tracking.composite import CompositeTracker, Progress, format_seconds
from rlsys.tracking.guarded import GuardedTracker

GIT_KEYS = {"commit", "branch", "changed_files", "remote"}


class Clock:
    """A clock that moves only on command."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Recorder(Tracker):
    """Records its calls; raises on close if asked to."""

    def __init__(self, error: str | None = None) -> None:
        self.calls: list[tuple] = []
        self.error = error

    def log_metrics(self, step, metrics):
        self.calls.append(("metrics", step, dict(metrics)))

    def log_completions(self, step, group, advantages, split="train"):
        self.calls.append(("completions", step, group.group_id, advantages, split))

    def close(self):
        self.calls.append(("close",))
        if self.error:
            raise RuntimeError(self.error)


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_the_log_line_has_every_key_of_the_contract(run):
    tracker = build_tracker(make_config(run.path))
    tracker.log_metrics(12, DRIVER_METRICS)
    tracker.close()
    (row,) = read_jsonl(run.metrics)
    assert [key for key in LOG_LINE_KEYS if key not in row] == []
    assert row["step"] == 12
    assert row["global_step/max_steps"] == "12/60"
    assert row["percentage"] == "20.00%"
    assert {key: row[key] for key in DRIVER_METRICS} == DRIVER_METRICS


def test_an_evaluation_is_a_line_of_its_own_without_progress(run):
    tracker = build_tracker(make_config(run.path))
    tracker.log_metrics(0, {"eval/reward": 0.3})
    tracker.log_metrics(1, {"reward": 1.0})
    tracker.close()
    first, second = read_jsonl(run.metrics)
    assert first == {"step": 0, "eval/reward": 0.3}
    assert second["percentage"] == "1.67%"


def test_a_nan_loss_reaches_every_tracker_and_the_file_stays_json(run, capsys):
    tracker = build_tracker(make_config(run.path, ["tensorboard"]))
    tracker.log_metrics(1, DRIVER_METRICS | {"loss": math.nan, "kl": math.inf})
    tracker.close()
    row = json.loads(run.metrics.read_text())
    assert (row["loss"], row["kl"]) == (None, None)
    assert "loss nan" in capsys.readouterr().out


def test_speed_and_time_left_leave_the_start_of_the_engines_out():
    clock = Clock()
    progress = Progress(max_steps=4, clock=clock)
    clock.now += 100 + 10  # the engines start, then the first step
    first = progress.metrics(1, 10.0)
    assert (first["elapsed_time"], first["remaining_time"]) == ("1m 50s", "30s")
    assert first["train_speed(iter/s)"] == 0.1
    clock.now += 30
    second = progress.metrics(2, 28.0)  # 40 seconds for two steps, with the time between them
    assert (second["elapsed_time"], second["remaining_time"]) == ("2m 20s", "40s")
    assert second["train_speed(iter/s)"] == 0.05


def test_after_a_resume_only_this_process_counts():
    clock = Clock()
    progress = Progress(max_steps=60, clock=clock)
    clock.now += 10
    metrics = progress.metrics(51, None)
    assert metrics["global_step/max_steps"] == "51/60"
    assert metrics["elapsed_time"] == "10s"
    assert metrics["train_speed(iter/s)"] == 0.1
    assert metrics["remaining_time"] == "1m 30s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (192, "3m 12s"), (3605, "1h 0m 5s"), (172801, "2d 0h 0m 1s")],
)
def test_times_are_written_as_ms_swift_writes_them(seconds, text):
    assert format_seconds(seconds) == text


def test_a_resume_drops_what_was_recorded_after_its_checkpoint(run):
    config = make_config(run.path)
    killed = build_tracker(config)
    for step in (1, 2, 3):
        killed.log_completions(step, make_group(["a", "b"], [1.0, 0.0]), [0.7, -0.7])
        killed.log_metrics(step, {"reward": step})
        killed.log_completions(step, make_group(["c", "d"], [1.0, 0.0]), None, split="eval")
    resumed = build_tracker(config, resumed_from=2)
    resumed.log_metrics(3, {"reward": 33})
    resumed.close()
    killed.close()
    assert [row["reward"] for row in read_jsonl(run.metrics)] == [1, 2, 33]
    for path in (run.completions, run.eval_completions):
        assert [row["step"] for row in read_jsonl(path)] == [1, 1, 2, 2]


def test_a_resume_cuts_rotated_completions_back(run):
    config = make_config(run.path, tracking={"completions_max_mb": 1})
    killed = build_tracker(config)
    for step in (1, 2, 3):
        group = make_group(["a" * 2**20, "b"], [1.0, 0.0])
        killed.log_completions(step, group, [0.7, -0.7])
    assert len(parts(run.completions)) == 3
    build_tracker(config, resumed_from=1).close()
    killed.close()
    rows = [row for part in parts(run.completions) for row in read_jsonl(part)]
    assert [row["step"] for row in rows] == [1, 1]
    assert set(parts(run.completions)) <= set(run.files)


def test_completions_can_be_left_out(run):
    tracker = build_tracker(make_config(run.path, tracking={"log_completions": False}))
    tracker.log_completions(1, make_group(["a", "b"], [1.0, 0.0]), None)
    tracker.close()
    assert not run.completions.exists()


def test_status_says_whether_the_run_is_still_going(run):
    assert not run.has_ended()
    tracker = build_tracker(make_config(run.path))
    assert not run.has_ended()
    tracker.close()
    assert run.has_ended()
    build_tracker(make_config(run.path), resumed_from=0)
    assert not run.has_ended()


def test_every_tracker_is_closed_once_even_when_one_fails(run, capsys):
    recorders = [Recorder(), Recorder(error="disk full"), Recorder()]
    parts = [GuardedTracker(f"part {n}", part) for n, part in enumerate(recorders)]
    tracker = CompositeTracker(list(parts), run, Progress(1))
    tracker.close()
    tracker.close()
    assert [part.calls for part in recorders] == [[("close",)]] * 3
    assert "note: part 1 does not work: RuntimeError: disk full" in capsys.readouterr().out
    assert run.has_ended()


def test_a_part_that_fails_stops_nothing_and_says_once_what_was_lost(run, capsys):
    class Full(Recorder):
        def log_metrics(self, step, metrics):
            if step in (2, 3, 4):
                raise OSError(28, "No space left on device")
            super().log_metrics(step, metrics)

    full, other = Full(), Recorder()
    tracker = CompositeTracker([GuardedTracker("metrics.jsonl", full), other], run, Progress(9))
    for step in range(1, 7):
        tracker.log_metrics(step, {"reward": 1.0})
    assert [call[1] for call in full.calls] == [1, 5, 6]
    assert [call[1] for call in other.calls] == [1, 2, 3, 4, 5, 6]
    first, second = capsys.readouterr().out.splitlines()
    assert "note: metrics.jsonl does not work: OSError: [Errno 28] No space left" in first
    assert second == "note: metrics.jsonl works again; lost: 3 steps"


def test_each_process_leaves_its_environment(run, capsys):
    build_tracker(make_config(run.path)).close()
    build_tracker(make_config(run.path), resumed_from=3).close()
    first, second = read_jsonl(run.environment)
    assert (first["resumed_from"], second["resumed_from"]) == (None, 3)
    assert first["packages"]["torch"] == torch.__version__
    assert set(first["git"]) in ({"commit", "branch", "changed_files"}, GIT_KEYS, set())
    assert f"torch {torch.__version__}" in capsys.readouterr().out


def test_the_status_comes_first_and_the_picture_last(run):
    """`ray job stop` kills three seconds later."""

    class Closing(Recorder):
        def close(self):
            assert run.has_ended()
            assert not run.reward_curve.exists()
            super().close()

    tracker = build_tracker(make_config(run.path))
    tracker.log_metrics(1, DRIVER_METRICS)
    for number in range(len(tracker._parts)):
        tracker._parts.insert(2 * number, Closing())
    recorders = tracker._parts[::2]
    tracker.close()
    assert all(recorder.calls == [("close",)] for recorder in recorders)
    assert run.reward_curve.exists()


def test_groups_reach_every_tracker_with_their_split(run):
    recorder = Recorder()
    tracker = CompositeTracker([recorder], run, Progress(1))
    tracker.log_completions(1, make_group(["a", "b"]), [0.5, -0.5])
    tracker.log_completions(0, make_group(["a", "b"], group_id=7), None, split="eval")
    assert recorder.calls == [
        ("completions", 1, 0, [0.5, -0.5], "train"),
        ("completions", 0, 7, None, "eval"),
    ]


def reporting_to(run: RunDir, name: str) -> Config:
    """A config that names a tracker which config.py does not know."""
    config = make_config(run.path)
    tracking = config.tracking.model_copy(update={"report_to": [name]})
    return config.model_copy(update={"tracking": tracking})


def test_a_new_tracker_is_a_class_and_a_name(run, monkeypatch):
    monkeypatch.setattr(trackers, "data", dict(trackers.data))  # forget the name afterwards
    built = []

    @register_tracker("mine")
    class Mine(Recorder):
        def __init__(self, config, resumed_from):
            super().__init__()
            built.append((config.output_dir, resumed_from, self))

    config = reporting_to(run, "mine")
    tracker = build_tracker(config, resumed_from=4)
    tracker.log_metrics(5, {"reward": 1.0})
    tracker.close()
    ((output_dir, resumed_from, mine),) = built
    assert (output_dir, resumed_from) == (str(run.path), 4)
    assert [call[0] for call in mine.calls] == ["metrics", "close"]


def test_an_unknown_tracker_is_named_with_the_known_ones(run):
    with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord'\. Did you mean 'tensorb"):
        build_tracker(reporting_to(run, "tensorbord"))
    with pytest.raises(ValueError, match=r"unknown tracker 'comet_ml'\. Known: .*wandb"):
        build_tracker(reporting_to(run, "comet_ml"))
    assert not run.path.exists()


def test_wandb_that_is_not_installed_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr(packages, "installed_version", lambda name: None)
    with pytest.raises(ValueError, match='pip install "wandb'):
        build_tracker(make_config(run.path, ["wandb"]))
