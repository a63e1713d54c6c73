"""Weights through shared memory, between real processes; tests/gpu has the same on a GPU."""

import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from ipc_ranks import Rank, check_death, check_updates, connect, expected

from rlsys.weight_sync import ipc
from rlsys.weight_sync.transport import WeightSyncError

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def ranks():
    ranks = [Rank("cpu") for _ in range(3)]
    yield ranks
    for rank in ranks:
        rank.close()


@pytest.fixture
def mortal():
    """A process that a test may end."""
    rank = Rank("cpu")
    yield rank
    rank.close()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("slow", [None, "sender", "receiver"])
def test_nobody_reads_too_early_or_overwrites_too_early(ranks, slow, keep):
    check_updates(ranks, (1, 2), slow=slow, keep=keep)


def test_receivers_wait_for_a_late_sender(ranks):
    sender, receiver, _ = ranks
    store = connect(sender, [receiver])
    receiving = receiver.receive(1)
    time.sleep(0.5)
    assert not receiving.done()
    sender.send(1).result()
    assert receiving.result() == expected(1)
    del store


def test_a_sender_that_dies_is_a_named_timeout(mortal, ranks):
    check_death(mortal, ranks[1:], timeout_s=1.0)


def test_a_receiver_that_dies_is_named_by_the_sender(mortal, ranks):
    sender, receiver, _ = ranks
    store = connect(sender, [receiver, mortal], timeout_s=1.0)
    receiving = receiver.receive(1)
    with pytest.raises(BrokenProcessPool):
        mortal.die().result()
    with pytest.raises(WeightSyncError, match=r"rank 0 of 3, meeting .*1 s \(without rank 2\)"):
        sender.send(1).result()
    with pytest.raises(WeightSyncError, match=r"rank 1 of 3, waiting for the sender"):
        receiving.result()
    del store


def test_memory_of_another_host_is_refused(ranks, monkeypatch):
    monkeypatch.setattr(ipc, "_place", lambda device: "host elsewhere")
    memory = ipc.IpcTransport(torch.device("cpu")).sending_memory(2, 64)
    handle = ipc._handle(memory)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"memory is on host elsewhere, this rank on host \S+"):
        ipc._open(handle, torch.device("cpu"))


def test_shared_memory_begins_with_zeros_and_is_one(monkeypatch):
    memory = ipc.IpcTransport(torch.device("cpu")).sending_memory(2, 64)
    assert memory.shape == (2, 64)
    assert not memory.any()
    opened = ipc._open(ipc._handle(memory), torch.device("cpu"))
    memory[1, 3] = 7
    assert opened.nonzero().tolist() == [[64 + 3]]
