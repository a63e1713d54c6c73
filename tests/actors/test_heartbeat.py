"""Actors that stop are killed within their limit; those that compute or start are left alone."""

import os
import signal
import time

import pytest
import ray
from patience import PATIENCE_S

from rlsys.actors.group import ActorGroup, on_cpu
from rlsys.actors.heartbeat import Alive
from rlsys.actors.recovery import Restarts
from rlsys.actors.waiting import ActorDeath, get_one
from rlsys.config.schema import RecoveryConfig

pytestmark = pytest.mark.system

LIMIT_S = 2.0


class Worker(Alive):
    def __init__(self, rank):
        self.rank, self.problem = rank, None

    def compute(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))
        return os.getpid()

    def break_down(self, problem):
        self.problem = problem

    def heartbeat(self):
        return self.problem


class Async(Alive):
    def __init__(self, rank):
        time.sleep(2 * LIMIT_S)  # a member that loads its model

    async def compute(self, seconds):
        return os.getpid()


@pytest.fixture
def watched(ray_cluster):
    lines, groups, restarts = (
        [],
        [],
        Restarts(RecoveryConfig(), say=lambda line: lines.append(line)),
    )

    def start(actor_class):
        group = ActorGroup(
            "workers", "worker", actor_class, size=2, env={}, place=on_cpu, timeout_s=PATIENCE_S
        )
        groups.append(group)
        restarts.watch(group, LIMIT_S)
        return group, restarts, lines

    yield start
    restarts.close()
    for group in groups:
        group.close()


@pytest.mark.parametrize("actor_class", [Worker, Async])
def test_a_stopped_process_is_killed_and_one_that_starts_or_computes_is_not(watched, actor_class):
    group, restarts, lines = watched(actor_class)
    pids = group.call("compute", 2 * LIMIT_S)
    assert lines == []
    os.kill(pids[1], signal.SIGSTOP)
    ref = group.actors["worker 1"].compute.remote(0)
    assert ray.wait([ref], timeout=PATIENCE_S)[0]
    with pytest.raises(ActorDeath, match="worker 1 died in the test") as caught:
        get_one(ref, name="worker 1", phase="the test")
    reason = "it gave no sign of life for 2 s"
    assert lines == [f"note: worker 1 is killed: {reason}"]
    assert restarts.reason(caught.value) == reason
    assert group.actors["worker 0"].compute.remote(0)
    assert restarts.heartbeats.reason("worker 0") is None


def test_a_member_that_names_its_own_problem_is_killed_and_its_successor_is_watched(watched):
    group, restarts, lines = watched(Worker)
    group.call("compute", 0)
    for problem in ("its worker is gone", "it is gone again"):
        ray.get(group.actors["worker 0"].break_down.remote(problem))
        ref = group.actors["worker 0"].compute.remote(PATIENCE_S)
        with pytest.raises(ActorDeath):
            get_one(ref, name="worker 0", phase="the test")
        assert restarts.heartbeats.reason("worker 0") == problem
        group.actors["worker 0"] = group.create(0)
    assert len(lines) == 2
