"""A deadline passes: where the silent actor is stuck stands in a file that the error names."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import ray

from rlsys.actors import silent
from rlsys.actors.group import ActorGroup, on_cpu
from rlsys.actors.heartbeat import HEARTBEAT, Alive
from rlsys.actors.waiting import ActorFailure, PhaseTimeout
from rlsys.stacks import answer_for_stacks

pytestmark = pytest.mark.system


class Rank(Alive):
    def __init__(self, rank):
        answer_for_stacks()
        self.rank = rank

    def pid(self):
        return os.getpid()

    def work(self):
        self.waits_for_the_others()

    def waits_for_the_others(self):
        if self.rank == 0:
            raise RuntimeError("Timed out waiting for rank 1 in all_reduce")
        time.sleep(3600)


@pytest.fixture
def group(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(silent, "_folder", tmp_path / "logs")
    group = ActorGroup("policy", "policy rank", Rank, size=3, env={}, place=on_cpu, timeout_s=60.0)
    group.pids = group.call("pid")
    all_actors = dict(group.actors)
    yield group
    for pid in group.pids:
        os.kill(pid, signal.SIGCONT)
    group.actors = all_actors
    group.close()


def saved(error, name):
    """The stacks that an error names."""
    return Path(re.search(rf"{name}: .*stacks are in (.*)\n", str(error))[1]).read_text()


def test_the_stacks_of_silent_actors_are_saved_and_named(group, tmp_path):
    group.timeout_s = 1.0
    group.actors = {"policy rank 1": group.actors["policy rank 1"]}
    with pytest.raises(PhaseTimeout, match=r"policy work did not finish within 1 s") as caught:
        group.call("work")
    text = saved(caught.value, "policy rank 1")
    assert "in waits_for_the_others" in text
    assert "in work" in text
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["stacks-policy-rank-1-1.txt"]


def test_a_rank_that_waited_in_vain_shows_where_the_others_are(group):
    os.kill(group.pids[2], signal.SIGSTOP)
    with pytest.raises(ActorFailure, match=r"policy rank 0 failed in policy work: .*\Z") as caught:
        group.call("work")
    assert "in waits_for_the_others" in saved(caught.value, "policy rank 1")
    process = f"its process {group.pids[2]}"
    assert f"policy rank 2: {process} is stopped (SIGSTOP, or a debugger)" in str(caught.value)


class StartsForEver(Rank):
    def __init__(self, rank):
        super().__init__(rank)
        self.loads_for_ever()

    def loads_for_ever(self):
        time.sleep(3600)


@pytest.mark.slow
def test_an_actor_whose_constructor_hangs_is_seen_too(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(silent, "_folder", tmp_path)
    group = ActorGroup(
        "policy", "policy rank", StartsForEver, size=1, env={}, place=on_cpu, timeout_s=15.0
    )
    with pytest.raises(PhaseTimeout) as caught:
        group.call("pid")
    assert "in loads_for_ever" in saved(caught.value, "policy rank 0")
    group.close()


def test_nothing_hangs_or_raises_where_nothing_can_be_learned(ray_cluster, monkeypatch):
    monkeypatch.setattr(silent, "PATIENCE_S", 1.0)
    monkeypatch.setattr(silent, "_read_on", lambda node, pid: time.sleep(60))
    actor = ray.remote(num_cpus=0, concurrency_groups={HEARTBEAT: 1})(Rank).remote(1)
    ray.get(actor.pid.remote(), timeout=60)
    lines = silent.explain_silence(
        {"hangs": actor._actor_id.hex(), "unknown": "00" * 16, "task": "ff" * 12 + "01000000"}
    )
    assert lines.splitlines()[0] == "hangs: no stacks came within 1 s"
    ray.kill(actor)
