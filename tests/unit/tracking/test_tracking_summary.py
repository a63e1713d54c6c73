"""The table at the end: what it is about, and when there is one."""

from __future__ import annotations

import pytest
from tracking_cases import make_config

from rlsys.files import read_jsonl
from rlsys.run.folder import RunDir
from rlsys.timeline.spans import Timeline, span_of
from rlsys.tracking import build_tracker
from rlsys.tracking.summary import SummaryTracker


class Run:
    """A run with a clock of its own; each step samples for 3 s and updates for 1."""

    def __init__(self, folder, **options):
        folder.mkdir(exist_ok=True)
        self.config = make_config(folder, **options)
        self.dir = RunDir(folder)
        self.tracker = SummaryTracker(self.config, self.dir)
        self.now = 1000.0
        self.line = Timeline(self.tracker.log_timeline, lambda: self.now)

    def take(self, *steps, longest=10.0):
        for step in steps:
            timer = self.line.begin_step(step)
            with timer("rollout"):
                self.line.now_doing("rollout engine 0", "rollout", "sample")
                self.now += 3
                self.line.now_doing("rollout engine 0", "rollout", None)
            answers = self.line.answers("policy", "update")
            with timer("policy_update"):
                self.now += 1
                answers("policy rank 0")
            lengths = {"completions/max_length": longest, "completions/mean_length": 10.0}
            self.tracker.log_metrics(step, {"num_completion_tokens": 400.0, **lengths})
        return self

    def end(self, capsys) -> str:
        self.line.close()
        self.tracker.close()
        return capsys.readouterr().out


@pytest.fixture
def start(tmp_path):
    return lambda **options: Run(tmp_path / "run", **options)


def test_the_table_is_printed_and_in_a_file(start, capsys):
    run = start().take(1, 2)
    run.tracker.begin(run.config, "cuda")
    said = run.end(capsys)
    text = run.dir.summary.read_text()
    assert said == f"\n{text}\n"
    assert text.startswith("Where the time went, steps 1 to 2: 8.0 s, 4.00 s a step\n")
    assert "completion tokens a second: 100\n" in text
    assert "| policy rank 0    |  25% |  75% |" in text
    assert text.endswith("the engines 25%, in turns: set rollout.max_staleness: 1\n")


def test_what_was_decided_at_the_start_counts(start, capsys):
    run = start().take(1)
    run.tracker.begin(run.config.model_copy(update={"placement": "colocated"}), "cpu")
    assert "more cores" in run.end(capsys)
    run = start().take(1, longest=80.0)
    run.tracker.begin(run.config.model_copy(update={"placement": "colocated"}), "cuda")
    assert "the longest completion of a step has 8.0 x the mean length" in run.end(capsys)


def test_a_resumed_run_is_about_its_own_steps(start, capsys):
    assert "Where the time went, steps 41 to 42:" in start().take(41, 42).end(capsys)


def test_a_run_that_took_no_step_says_nothing(start, capsys):
    run = start()
    assert run.end(capsys) == ""
    assert not run.dir.summary.exists()


def test_evaluations_are_no_steps_of_their_own(start, capsys):
    run = start().take(1)
    run.tracker.log_metrics(1, {"eval/reward": 1.0})
    assert "completion tokens a second: 100\n" in run.end(capsys)


def test_spans_are_in_the_file_and_later_ones_go_when_a_run_resumes(tmp_path, capsys):
    config = make_config(tmp_path / "run")
    run = RunDir(tmp_path / "run")

    def take(resumed_from, *steps):
        tracker = build_tracker(config, resumed_from=resumed_from)
        line = Timeline(tracker.log_timeline, clock=lambda: 1000.0)
        for step in steps:
            line.begin_step(step)
            line.add("policy rank 0", "policy", "update", 1000.0 + step, 1001.0 + step)
        line.close()
        tracker.close()
        return [span_of(row).step for row in read_jsonl(run.timeline)]

    assert take(None, 1, 2, 3) == [1, 2, 3]
    assert take(2, 3, 4) == [1, 2, 3, 4]
    capsys.readouterr()
