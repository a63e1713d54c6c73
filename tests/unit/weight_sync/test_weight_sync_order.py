"""The order of operations on buffers; on GPUs, streams keep exactly this order."""

import pytest
import torch

from rlsys.weight_sync.connection import Connection, whole_tensors
from rlsys.weight_sync.plan import TensorMeta
from rlsys.weight_sync.receiver import WeightReceiver
from rlsys.weight_sync.sender import WeightSender, sending_memory
from rlsys.weight_sync.transport import Transport, transports

CPU = torch.device("cpu")
EVENTS = []


@transports.register("telling")
class TellingTransport(Transport):
    """Sends nothing and records its calls."""

    buffer_device = CPU

    def connect(self, connection, rank, memory=None):
        EVENTS.clear()

    def barrier(self, number, *, what):
        EVENTS.append(f"barrier {number}")
        return number

    def broadcast(self, buffer, *, what):
        name = what.partition("bucket ")[2].partition(" ")[0] or what
        EVENTS.append(f"broadcast {name}")
        return lambda: EVENTS.append(f"wait {name}")

    def _join(self, store, timeout):
        raise AssertionError

    def _begin_broadcast(self, buffer):
        raise AssertionError


def connection_of(num_buckets):
    return Connection(
        slices=whole_tensors(TensorMeta(f"t{i}", "float32", (4,)) for i in range(num_buckets)),
        sender=0,
        transport="telling",
        address="",
        port=0,
        world_size=2,
        bucket_bytes=16,
        verify=True,
        in_place=False,
        timeout_s=1.0,
    )


@pytest.fixture(params=range(1, 6), ids="{} buckets".format)
def connection(request):
    return connection_of(request.param)


def before(first, second):
    return EVENTS.index(first) < EVENTS.index(second)


def test_a_buffer_is_filled_when_it_is_free_and_sent_when_it_is_full(connection):
    sender = WeightSender(connection, CPU)
    addresses = {}

    def fill(bucket, buffer):
        EVENTS.append(f"fill {bucket.index}")
        addresses[bucket.index] = buffer.data_ptr()

    for _ in range(2):
        EVENTS.clear()
        sender.send(fill, 7)
        number = len(connection.slices)
        for i in range(number):
            assert before(f"fill {i}", f"broadcast {i}")
            assert before(f"broadcast {i}", f"wait {i}")
            if i > 0:
                assert before(f"broadcast {i - 1}", f"broadcast {i}")
                assert before(f"fill {i}", f"wait {i - 1}"), "it waits, and does not overlap"
            if i > 1:
                assert addresses[i] == addresses[i - 2]
                assert before(f"wait {i - 2}", f"fill {i}")
        assert EVENTS[:3] == ["fill 0", "barrier 7", "broadcast 0"]
        assert before(f"wait {number - 1}", "broadcast sending the checksums")
        assert EVENTS[-1] == "wait sending the checksums"


@pytest.mark.parametrize("num_buckets", [1, 2, 3])
def test_senders_that_share_memory_take_turns(num_buckets):
    connections = [connection_of(num_buckets)] * 2
    memory = sending_memory(connections, CPU)
    senders = [WeightSender(connection, CPU, memory) for connection in connections]
    for sender in senders:
        sender.send(lambda bucket, buffer: EVENTS.append(f"fill {bucket.index}"), 7)
    first, second = EVENTS[: len(EVENTS) // 2], EVENTS[len(EVENTS) // 2 :]
    assert first == second
    assert first[:2] == ["fill 0", "barrier 7"]
    assert first[-1] == "wait sending the checksums"


@pytest.mark.parametrize("keep", [True, False])
def test_a_bucket_is_used_after_it_arrived_and_before_its_memory_is_reused(connection, keep):
    receiver = WeightReceiver(connection, CPU, rank=1)
    number = len(connection.slices)
    held = []
    for bucket, buffer in receiver.receive(7, keep=keep):
        EVENTS.append(f"use {bucket.index}")
        held.append(buffer)
    assert EVENTS[:2] == ["barrier 7", "broadcast 0"]
    assert [f"use {i}" for i in range(number)] == [e for e in EVENTS if e.startswith("use")]
    for i in range(number):
        assert before(f"wait {i}", f"use {i}")
        if i > 0:
            assert before(f"broadcast {i}", f"use {i - 1}"), "it waits, and does not overlap"
        if i > 1:
            assert (held[i].data_ptr() == held[i - 2].data_ptr()) != keep
            assert before(f"use {i - 2}", f"broadcast {i}")
