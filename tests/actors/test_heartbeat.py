"""Actors that stop are killed within their limit; those that compute or start are left alone."""

import json
import os
import re
import signal
import time

import pytest
import ray
from patience import PATIENCE_S
from ray._private.state import state

from rlsys.actors.group import ActorGroup, on_cpu
from rlsys.actors.heartbeat import Alive
from rlsys.actors.recovery import Restarts
from rlsys.actors.waiting import ActorDeath, get_one
from rlsys.config.schema import RecoveryConfig

pytestmark = pytest.mark.system

LIMIT_S = 2.0
START_S = 2 * LIMIT_S
SILENT = "it gave no sign of life for 2 s"


class Worker(Alive):
    def __init__(self, start_seconds, rank):
        time.sleep(start_seconds if rank == 0 else 0)
        self.rank, self.fault = rank, None

    def compute(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))
        return os.getpid()

    def break_down(self, fault):
        self.fault = fault

    def find_fault(self):
        return self.fault


class Async(Worker):
    async def compute(self, seconds):
        return os.getpid()


@pytest.fixture
def watched(ray_cluster, tmp_path):
    lines, groups = [], []
    restarts = Restarts(RecoveryConfig(), say=lines.append, table=tmp_path / "actors.json")

    def start(actor_class):
        group = ActorGroup(
            "workers", "worker", actor_class, START_S, size=2, env={}, place=on_cpu, timeout_s=60
        )
        groups.append(group)
        group.call("compute", 0)
        restarts.watch(group, LIMIT_S)
        return group, restarts, lines

    yield start
    restarts.close()
    for group in groups:
        group.close()


def check_table(path, pids):
    """The file with the actors of the group: the first one is the second under its name."""
    deadline = time.monotonic() + PATIENCE_S
    while not all(row["alive"] for row in json.loads(path.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rows = json.loads(path.read_text())
    assert [(row["role"], row["rank"], row["restarts"]) for row in rows] == [
        ("worker", 0, 1),
        ("worker", 1, 0),
    ]
    assert [row["pid"] for row in rows] == pids
    for row in rows:
        assert re.fullmatch(rf"worker-{row['rank']}(-\d+)?", row["name"])
        assert 0.01 < row["memory_gib"] < 10
        assert row["started"] < row["last_heartbeat"] <= time.time()
        assert (row["gpu"], row["gpu_memory_gib"]) == (None, None)
    assert rows[0]["name"] != rows[1]["name"]


@pytest.mark.parametrize("actor_class", [Worker, pytest.param(Async, marks=pytest.mark.slow)])
def test_a_stopped_process_is_killed_and_one_that_starts_or_computes_is_not(
    watched, actor_class, tmp_path
):
    group, restarts, lines = watched(actor_class)
    group.is_starting = True
    group.actors["worker 0"] = group.create(0)
    pids = group.call("compute", 2 * LIMIT_S)
    group.is_starting = False
    assert lines == []
    check_table(tmp_path / "actors.json", pids)
    os.kill(pids[1], signal.SIGSTOP)
    ref = group.actors["worker 1"].compute.remote(0)
    assert ray.wait([ref], timeout=PATIENCE_S)[0]
    with pytest.raises(ActorDeath, match="worker 1 died in the test") as caught:
        get_one(ref, name="worker 1", phase="the test")
    assert len(lines) == 1
    assert lines[0].startswith(f"note: worker 1 is killed: {SILENT}\nworker 1: its process ")
    assert f"{pids[1]} is stopped (SIGSTOP" in lines[0]
    assert restarts.reason(caught.value) == SILENT
    assert restarts.heartbeats.reason("worker 0") is None


def wait_until_killed(ref, name, restarts):
    assert ray.wait([ref], timeout=PATIENCE_S)[0]
    with pytest.raises(ActorDeath):
        get_one(ref, name=name, phase="the test")
    return restarts.heartbeats.reason(name)


def test_a_successor_that_stops_before_its_first_sign_of_life_is_killed(watched):
    """It has started and joined, as an engine that is stopped in its first weight sync."""
    group, restarts, _ = watched(Worker)
    successor = group.create(1)
    os.kill(ray.get(successor.compute.remote(0)), signal.SIGSTOP)
    ref = successor.compute.remote(0)
    group.actors["worker 1"] = successor
    assert wait_until_killed(ref, "worker 1", restarts) == SILENT


@pytest.mark.slow
def test_a_successor_that_stops_while_it_starts_is_killed_and_one_without_a_place_waits(
    watched, monkeypatch
):
    monkeypatch.setattr("rlsys.actors.heartbeat.STARTING_FACTOR", 2)
    group, restarts, lines = watched(Worker)
    placed = group.create(0)
    pid = process_of(placed)
    group.is_starting = True
    homeless = group._actor_class.options(num_cpus=10**6).remote(0, 1)
    os.kill(pid, signal.SIGSTOP)  # before `__init__` has ended
    group.actors |= {"worker 0": placed, "worker 1": homeless}
    ref = placed.compute.remote(0)
    assert wait_until_killed(ref, "worker 0", restarts) == "it gave no sign of life for 4 s"
    assert len(lines) == 1


def process_of(actor):
    """The process of an actor that may be at its `__init__` still."""
    while not (pid := state.actor_table(actor._actor_id.hex()).get("Pid")):
        time.sleep(0.05)
    return pid


@pytest.mark.slow
def test_a_member_that_names_its_own_fault_is_killed_and_its_successor_is_watched(watched):
    group, restarts, lines = watched(Worker)
    group.is_starting = True  # those that replace others
    for fault in ("its worker is gone", "it is gone again"):
        ray.get(group.actors["worker 1"].break_down.remote(fault))
        ref = group.actors["worker 1"].compute.remote(PATIENCE_S)
        with pytest.raises(ActorDeath):
            get_one(ref, name="worker 1", phase="the test")
        assert restarts.heartbeats.reason("worker 1") == fault
        group.actors["worker 1"] = group.create(1)
    assert len(lines) == 2
    group.call("compute", LIMIT_S)
    assert restarts.heartbeats.reason("worker 1") is None, "a successor dies for reasons of its own"
