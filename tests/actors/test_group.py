"""Waiting for actors: who failed, at what, and which failure is the cause."""

import os
import time

import pytest
import ray

from rlsys.actors.waiting import ActorDeath, ActorFailure, PhaseTimeout, get_all

pytestmark = pytest.mark.system


@ray.remote(num_cpus=0.01, max_concurrency=2)
class Rank:
    def work(self, seconds, result=None, error=None, dies=False):
        time.sleep(seconds)
        if dies:
            os._exit(1)
        if error is not None:
            raise RuntimeError(error)
        return result


@pytest.fixture
def ranks(ray_cluster):
    actors = [Rank.remote() for _ in range(3)]
    yield actors
    for actor in actors:
        ray.kill(actor)


def wait(ranks, calls, timeout_s=60):
    refs = {
        f"rank {i}": rank.work.remote(**call)
        for i, (rank, call) in enumerate(zip(ranks, calls, strict=True))
    }
    return get_all(refs, phase="update", timeout_s=timeout_s)


def test_results_come_in_order_and_failures_at_once(ranks):
    calls = [{"seconds": 0.5 - 0.2 * i, "result": i} for i in range(3)]
    assert wait(ranks, calls) == [0, 1, 2]
    hangs, fails = {"seconds": 3600}, {"seconds": 0, "error": "out of memory"}
    with pytest.raises(ActorFailure, match=r"out of memory[^$]*rank 1 failed in update"):
        wait(ranks, [hangs, fails, hangs], timeout_s=3600)
    with pytest.raises(PhaseTimeout, match=r"update did not finish within 1 s.*rank 0, rank 2"):
        wait(ranks, [hangs, {"seconds": 0}, hangs], timeout_s=1)


def test_a_death_is_named_before_the_errors_that_it_causes(ranks):
    """The other ranks of a collective see that their peer is gone before Ray does."""
    gone = {"seconds": 0, "error": "connection closed by peer"}
    with pytest.raises(ActorDeath, match="rank 2 died in update"):
        wait(ranks, [gone, gone, {"seconds": 0.5, "dies": True}])
