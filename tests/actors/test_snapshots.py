"""Which snapshot of a group counts, and when the next one is due."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from patience import PATIENCE_S
from run_cases import own_environment

from rlsys.actors.keepers import Keepers
from rlsys.actors.snapshots import Report, Snapshots

pytestmark = [pytest.mark.system, pytest.mark.slow]


class Clock:
    def __init__(self, *times):
        self.times = list(times)

    def __call__(self):
        return self.times.pop(0)


class Rank:
    def take(self, content, size=10, fault=None, seconds=0.0):
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "fails":
            raise MemoryError("too large")
        node = ray.get_runtime_context().get_node_id()
        return content, Report(size, node, seconds=seconds)


@pytest.fixture
def ranks(ray_cluster):
    actors = {f"rank {i}": ray.remote(Rank).options(num_cpus=0).remote() for i in range(2)}

    def take(*args, **kwargs):
        return {
            name: actor.take.options(num_returns=2).remote(*args, **kwargs)
            for name, actor in actors.items()
        }

    yield take
    for actor in actors.values():
        ray.kill(actor)


def held(snapshots):
    newest = snapshots.newest
    return newest.version, [ray.get(ref) for ref in newest.states.values()]


def test_a_set_counts_once_it_is_whole(ranks):
    snapshots = Snapshots(1)
    snapshots.begin(1, ranks("one"))
    assert snapshots.newest is None
    snapshots.settle(timeout_s=PATIENCE_S)
    assert held(snapshots) == (1, ["one", "one"])
    parts = ranks("two") | {"rank 1": ranks("two", fault="dies")["rank 1"]}
    snapshots.begin(2, parts)
    snapshots.settle(timeout_s=PATIENCE_S)
    assert held(snapshots) == (1, ["one", "one"])


@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_the_next_one_is_due_when_this_one_was_two_percent_of_the_time(ranks, seconds):
    due = 101.0 + 50 * (1.0 + seconds)
    # Asked; began and ended to wait; asked twice.
    clock = Clock(0.0, 100.0, 101.0, due - 0.1, due + 0.1)
    snapshots = Snapshots("auto", clock=clock)
    assert snapshots.is_due(1)
    snapshots.begin(1, ranks("one", seconds=seconds))
    snapshots.settle(timeout_s=PATIENCE_S)
    assert not snapshots.is_due(2)
    assert snapshots.is_due(3)
    assert [Snapshots(3).is_due(version) for version in range(1, 7)] == 2 * [False, False, True]
    assert not Snapshots(0).is_due(3)


def test_what_cannot_be_taken_is_said_once_and_not_tried_again(ranks, capsys):
    snapshots = Snapshots(1)
    snapshots.begin(1, ranks("one", fault="fails"))
    snapshots.settle(timeout_s=PATIENCE_S)
    assert "could not take a snapshot (MemoryError('too large'))" in capsys.readouterr().out
    assert snapshots.newest is None
    assert not snapshots.is_due(2)


def test_snapshots_that_do_not_fit_are_not_kept(ranks, capsys):
    snapshots = Snapshots("auto")
    snapshots.begin(1, ranks("one", size=2**50))
    snapshots.settle(timeout_s=PATIENCE_S)
    assert "of Ray's object stores" in capsys.readouterr().out
    assert snapshots.newest is None
    assert not snapshots.is_due(2)


def test_on_one_node_nothing_is_copied_to_another(ray_cluster):
    keepers = Keepers()
    node = ray.get_runtime_context().get_node_id()
    keepers.keep("rank 0", ray.put(np.zeros(10)), node=node)
    assert keepers._keepers == {}


def test_what_is_kept_on_another_node_survives_its_own():
    script = Path(__file__).with_name("keep_on_two_nodes.py")
    ended = subprocess.run(
        [sys.executable, script],
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert f"kept {sum(range(1_000_000))}" in ended.stdout, ended.stderr
