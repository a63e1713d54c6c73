"""The order of what a sync does to its buffers: on GPUs, streams keep exactly this order."""

import pytest
import torch

from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import TensorMeta
from rlsys.weight_sync.receiver import WeightReceiver
from rlsys.weight_sync.sender import WeightSender
from rlsys.weight_sync.transport import Transport, transports

CPU = torch.device("cpu")
EVENTS = []


@transports.register("telling")
class TellingTransport(Transport):
    """Moves nothing, and notes what it is asked for."""

    buffer_device = CPU

    def connect(self, address, port, *, rank, world_size, timeout_s):
        EVENTS.clear()

    def broadcast(self, buffer, *, what):
        name = what.partition("bucket ")[2].partition(" ")[0] or what
        EVENTS.append(f"broadcast {name}")
        return lambda: EVENTS.append(f"wait {name}")

    def _begin_broadcast(self, buffer):
        raise AssertionError


@pytest.fixture(params=range(1, 6), ids="{} buckets".format)
def connection(request):
    return Connection(
        metadata=tuple(TensorMeta(f"t{i}", "float32", (4,)) for i in range(request.param)),
        transport="telling",
        address="",
        ports=(0,),
        world_size=2,
        bucket_bytes=16,
        verify=True,
        in_place=False,
        timeout_s=1.0,
    )


def before(first, second):
    return EVENTS.index(first) < EVENTS.index(second)


def test_a_buffer_is_filled_only_when_it_is_free_and_sent_only_when_it_is_full(connection):
    sender = WeightSender(connection, CPU)
    addresses = {}

    def fill(bucket, buffer):
        EVENTS.append(f"fill {bucket.index}")
        addresses[bucket.index] = buffer.data_ptr()

    for _ in range(2):
        EVENTS.clear()
        sender.send(fill, 0)
        number = len(connection.metadata)
        for i in range(number):
            assert before(f"fill {i}", f"broadcast {i}")
            assert before(f"broadcast {i}", f"wait {i}")
            if i > 0:
                assert before(f"broadcast {i - 1}", f"broadcast {i}")
                assert before(f"fill {i}", f"wait {i - 1}"), "it waits, and does not overlap"
            if i > 1:
                assert addresses[i] == addresses[i - 2]
                assert before(f"wait {i - 2}", f"fill {i}")
        assert before("wait sending the version", "broadcast 0")
        assert before(f"wait {number - 1}", "broadcast sending the checksums")
        assert EVENTS[-1] == "wait sending the checksums"


@pytest.mark.parametrize("keep", [True, False])
def test_a_bucket_is_used_when_it_is_there_and_before_its_memory_is_taken(connection, keep):
    receiver = WeightReceiver(connection, CPU, rank=1)
    number = len(connection.metadata)
    held = []
    for bucket, buffer in receiver.receive(keep=keep):
        EVENTS.append(f"use {bucket.index}")
        held.append(buffer)
    assert [f"use {i}" for i in range(number)] == [e for e in EVENTS if e.startswith("use")]
    for i in range(number):
        assert before(f"wait {i}", f"use {i}")
        if i > 0:
            assert before(f"broadcast {i}", f"use {i - 1}"), "it waits, and does not overlap"
        if i > 1:
            assert (held[i].data_ptr() == held[i - 2].data_ptr()) != keep
            assert before(f"use {i - 2}", f"broadcast {i}")
