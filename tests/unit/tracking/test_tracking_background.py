"""A tracker that is slow, dead or hangs neither stops a run nor makes a step wait."""

import threading
import time

import pytest
from tracking_cases import make_config, make_group

from rlsys.run.folder import RunDir
from rlsys.tracking import Tracker, background
from rlsys.tracking.background import BackgroundTracker
from rlsys.tracking.composite import CompositeTracker, Progress

PAUSE_S = 0.01


class Server:
    """What a tracker writes to; it can be down, and refuse single steps for ever."""

    def __init__(self):
        self.is_down = False
        self.refuses: set[int] = set()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.steps: list[int] = []
        self.groups: list[int] = []
        self.made = self.closed = 0

    def check(self):
        self.may_answer.wait()
        if self.is_down:
            raise ConnectionError("http://user:secret@server refused")


class Client(Tracker):
    def __init__(self, server):
        server.check()
        self.server = server
        server.made += 1

    def log_metrics(self, step, metrics):
        self.server.check()
        if step in self.server.refuses:
            raise ValueError(f"step {step} is refused")
        self.server.steps.append(step)

    def log_completions(self, step, group, advantages, split="train"):
        self.server.check()
        self.server.groups.append(group.group_id)

    def close(self):
        self.server.closed += 1


@pytest.fixture
def server():
    one = Server()
    yield one
    one.may_answer.set()


@pytest.fixture
def lines():
    return []


def start(server, lines, close_timeout_s=30.0):
    return BackgroundTracker(
        "mine",
        lambda: Client(server),
        close_timeout_s=close_timeout_s,
        say=lines.append,
        first_pause_s=PAUSE_S,
    )


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def log(tracker, *steps):
    for step in steps:
        tracker.log_metrics(step, {"reward": 1.0})


def test_everything_arrives_in_order_and_nothing_is_said(server, lines):
    tracker = start(server, lines)
    log(tracker, *range(100))
    tracker.log_completions(7, make_group(["a"], group_id=3), None)
    tracker.close()
    assert (server.steps, server.groups, server.closed) == ([*range(100)], [3], 1)
    assert lines == []


def test_a_server_that_is_down_at_the_start_and_later_loses_nothing_when_it_is_back(server, lines):
    server.is_down = True
    tracker = start(server, lines)
    log(tracker, 1, 2)
    until(lambda: tracker._failures >= 4)
    server.is_down = False
    until(lambda: server.steps == [1, 2])
    server.is_down = True
    log(tracker, 3, 4, 5)
    until(lambda: tracker._failures >= 4)
    server.is_down = False
    tracker.close()
    assert server.steps == [1, 2, 3, 4, 5]
    assert server.made > 1, "a client whose connection broke is made again"
    says = ["does not work: ConnectionError: http://***@server refused", "works again"] * 2
    assert [part in line for part, line in zip(says, lines, strict=True)] == [True] * 4


def test_a_server_that_stays_down_is_said_once_with_what_was_lost(server, lines):
    server.is_down = True
    tracker = start(server, lines)
    log(tracker, 1, 2, 3)
    tracker.log_completions(1, make_group(["a"]), None)
    until(lambda: tracker._failures >= 5)
    tracker.close()
    down, lost = lines
    assert "does not work" in down
    assert lost == "note: tracker 'mine'; lost: 3 steps, 1 completion group"


def test_a_record_that_is_refused_for_ever_does_not_hold_up_the_others(server, lines):
    server.refuses = {2}
    tracker = start(server, lines)
    log(tracker, 1, 2, 3, 4)
    until(lambda: server.steps == [1, 3, 4])
    tracker.close()
    assert lines[-1] == "note: tracker 'mine' works again; lost: 1 step"
    assert tracker.outages.lost == {"log_metrics": 1}


def test_one_that_hangs_makes_nobody_wait_and_the_loss_is_counted(server, lines, monkeypatch):
    monkeypatch.setattr(background, "MOST_TOKENS", 10)
    monkeypatch.setattr(background, "MOST_CALLS", 5)
    server.may_answer.clear()
    tracker = start(server, lines)
    for number in range(5):
        tracker.log_completions(1, make_group(["abcd"], group_id=number), None)
    log(tracker, *range(1, 8))
    assert tracker.outages.lost == {"log_completions": 3, "log_metrics": 2}
    server.may_answer.set()
    until(lambda: len(server.steps) == 5)
    until(lambda: not tracker._is_full)
    log(tracker, 8)
    tracker.close()
    assert server.groups == [0, 1], "completions do not take the place of metrics"
    assert server.steps == [1, 2, 3, 4, 5, 8]
    assert len(lines) == 3
    assert "is behind, 2 completion groups wait for it" in lines[0]
    assert lines[1] == "note: tracker 'mine' has caught up"
    assert "lost: 3 completion groups, 2 steps" in lines[2]


def test_a_group_that_is_larger_than_the_limit_is_taken_by_an_empty_queue(
    server, lines, monkeypatch
):
    monkeypatch.setattr(background, "MOST_TOKENS", 3)
    tracker = start(server, lines)
    tracker.log_completions(1, make_group(["abcd"]), None)
    tracker.close()
    assert server.groups == [0]


def test_the_end_of_a_run_waits_for_it_only_so_long(server, lines):
    server.may_answer.clear()
    tracker = start(server, lines, close_timeout_s=0.05)
    log(tracker, 1)
    tracker.close()
    assert "has not ended within 0.05 s (tracking.close_timeout_s); not written: 1 step" in lines[0]


def test_a_loss_is_a_metric_of_the_other_trackers(server, lines, tmp_path, monkeypatch):
    monkeypatch.setattr(background, "MOST_CALLS", 1)
    server.may_answer.clear()
    seen = []

    class Seen(Tracker):
        def log_metrics(self, step, metrics):
            seen.append(metrics.get("tracking/mine/lost"))

        def close(self):
            pass

    parts = [Seen(), start(server, lines)]
    tracker = CompositeTracker(parts, RunDir(tmp_path / "run"), Progress(9))
    log(tracker, 1, 2, 3)
    assert seen == [None, None, 1.0]
    server.may_answer.set()
    tracker.close()
    assert make_config(tmp_path).tracking.close_timeout_s == 30
