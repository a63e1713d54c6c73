"""The profiler: when it starts and ends, and that it cannot end a run."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest

from rlsys.actors.profile import Profiler
from rlsys.actors.waiting import ActorDeath
from rlsys.config.schema import ProfileConfig
from rlsys.timeline.spans import Timeline


class Group:
    """A role without actors that notes what it is asked."""

    def __init__(self, line: Timeline, *, fails_in: str | None = None):
        self.actors: dict = {}
        self.calls: list[tuple] = []
        self._line, self._fails_in = line, fails_in

    def call(self, method, *args):
        self.calls.append((method, *args))
        if method == self._fails_in:
            raise ActorDeath("policy rank 0 died", actor="policy rank 0", reason="it ended")
        return []


class Run:
    """A timeline of `steps` steps, each with an update of a second."""

    def __init__(self, folder, profile: dict, *, device="cpu", fails_in=None):
        self.now = 1000.0
        self.line = Timeline(lambda spans: None, lambda: self.now)
        self.policy = Group(self.line, fails_in=fails_in)
        self.folder = folder
        config = SimpleNamespace(profile=ProfileConfig(**profile))
        Profiler(config, device, {"policy": self.policy}, self.line, folder)

    def take(self, *steps):
        for step in steps:
            timer = self.line.begin_step(step)
            with timer("policy_update"):
                self.now += 1
        return self

    def steps_in(self, name) -> set[int]:
        with gzip.open(self.folder / name, "rt") as file:
            events = json.load(file)["traceEvents"]
        return {event["args"]["step"] for event in events if event["name"] == "policy_update"}


def test_the_steps_are_traced_and_written_when_the_next_one_begins(tmp_path, capsys):
    run = Run(tmp_path, {"steps": "2:3", "torch": ["policy"]})
    run.take(1)
    assert run.policy.calls == []
    run.take(2, 3)
    assert run.policy.calls == [("start_trace", True, False)]
    run.take(4, 5)
    run.line.close()
    assert run.policy.calls[1:] == [("stop_trace", tmp_path, "steps-2-3-policy")]
    assert run.steps_in("steps-2-3.json.gz") == {2, 3}
    assert "profile: steps 2 to 3 in" in capsys.readouterr().out


def test_the_end_of_the_run_ends_the_profile(tmp_path):
    run = Run(tmp_path, {"steps": "2:9"}).take(1, 2, 3)
    run.line.close()
    assert run.steps_in("steps-2-9.json.gz") == {2, 3}
    assert run.policy.calls == []  # torch was not asked for


def test_a_run_that_resumes_within_the_steps_traces_the_rest(tmp_path):
    run = Run(tmp_path, {"steps": "2:4"}).take(4, 5)
    run.line.close()
    assert run.steps_in("steps-2-4.json.gz") == {4}


def test_steps_that_were_not_reached_are_a_note(tmp_path, capsys):
    Run(tmp_path, {"steps": "7"}).take(1, 2).line.close()
    assert "the run did not reach the steps of profile.steps, step 7" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails_in", ["start_trace", "stop_trace"])
def test_an_actor_that_dies_costs_its_part_only(tmp_path, capsys, fails_in):
    run = Run(tmp_path, {"steps": "1:2", "torch": ["policy"]}, fails_in=fails_in).take(1, 2, 3)
    run.line.close()
    assert run.steps_in("steps-1-2.json.gz") == {1, 2}
    assert "note: the profile of steps 1 to 2 is not whole" in capsys.readouterr().out


def test_a_run_that_is_not_profiled_pays_nothing(tmp_path):
    run = Run(tmp_path, {})
    assert len(run.line.writers) == 1
    assert run.line.on_step == []


def test_memory_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"profile\.memory .* on the CPU"):
        Run(tmp_path, {"steps": "1", "memory": True})
