"""Senders and receivers over the real transports of CPUs, in threads of this process."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from rlsys.weight_sync import transport
from rlsys.weight_sync.connection import (
    Connection,
    endpoints_of_shards,
    endpoints_of_tensors,
    ranks_of_connections,
    senders_of_shards,
    whole_tensors,
)
from rlsys.weight_sync.plan import TensorMeta
from rlsys.weight_sync.receiver import WeightReceiver
from rlsys.weight_sync.sender import WeightSender
from rlsys.weight_sync.transport import LOOPBACK, WeightSyncError, make_transport, serve_store

pytestmark = pytest.mark.processes

CPU = torch.device("cpu")
TENSORS = {
    "embed": torch.randn(50, 8),
    "norm": torch.randn(8).bfloat16(),
    "layer.q": torch.randn(8, 8).t(),  # not contiguous
    "layer.k": torch.randn(3, 8).half(),
    "head": torch.randn(50, 8),
}
METADATA = tuple(
    TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    for name, tensor in TENSORS.items()
)


class Network:
    """What every connection of a test uses."""

    transport: str


@pytest.fixture(autouse=True, params=["gloo", "ipc"])
def transport_name(request, monkeypatch):
    monkeypatch.setattr(Network, "transport", request.param, raising=False)
    return request.param


def connection(store, *, world_size, timeout_s=20.0, label=""):
    return Connection(
        slices=whole_tensors(METADATA),
        sender=0,
        transport=Network.transport,
        address=LOOPBACK,
        port=store.port,
        world_size=world_size,
        bucket_bytes=400,
        verify=True,
        in_place=False,
        timeout_s=timeout_s,
        label=label,
    )


class Ranks:
    """A policy rank and two receivers that are connected: in one connection, or in one each.

    `timeout_s` holds once they are connected. torch asks the name server who 127.0.0.1 is, and a
    lost question alone takes 5 seconds.
    """

    def __init__(self, *, timeout_s=20.0, apart=False):
        self.stores = [serve_store(LOOPBACK, 20.0) for _ in range(1 + apart)]
        connections = [
            connection(
                store,
                world_size=2 if apart else 3,
                label=f" in connection {index} of 2" if apart else "",
            )
            for index, store in enumerate(self.stores)
        ]
        self.threads = ThreadPoolExecutor(4)
        senders = [self.threads.submit(WeightSender, sent, CPU) for sent in connections]
        endpoints = endpoints_of_tensors(
            connections, ranks_of_connections([0, 1], len(connections)), workers_per_engine=1
        )
        receivers = [
            self.threads.submit(WeightReceiver, received, CPU, rank=rank)
            for ((received, rank),) in endpoints
        ]
        self.senders = [sender.result() for sender in senders]
        self.receivers = [receiver.result() for receiver in receivers]
        for end in (*self.senders, *self.receivers):
            set_deadline(end._transport, timeout_s)

    def send(self, fill, version):
        return sum(sender.send(fill, version) for sender in self.senders)

    def start_receiving(self, version=0, *, keep=True):
        return [
            self.threads.submit(receive, receiver, version, keep) for receiver in self.receivers
        ]


def set_deadline(transport, timeout_s):
    transport._connection = replace(transport._connection, timeout_s=timeout_s)
    transport._store.set_timeout(timedelta(seconds=timeout_s))
    if Network.transport == "gloo":
        transport._group._set_default_timeout(timedelta(seconds=timeout_s))


def receive(receiver, version, keep):
    """All tensors of an update, copied while they are there."""
    tensors = {}
    for bucket, buffer in receiver.receive(version, keep=keep):
        tensors |= {name: view.clone() for name, view in bucket.views(buffer)}
    receiver.check()
    return tensors


def fill_from(tensors):
    def fill(bucket, buffer):
        for name, view in bucket.views(buffer):
            view.copy_(tensors[name])

    return fill


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("keep", [True, False])
def test_every_receiver_gets_equal_bits_again_and_again(keep, apart):
    ranks = Ranks(apart=apart)
    for version, scale in enumerate((1, 3, -2)):  # updates through the same connection
        tensors = {name: tensor * scale for name, tensor in TENSORS.items()}
        receiving = ranks.start_receiving(version, keep=keep)
        seconds = ranks.send(fill_from(tensors), version)
        assert seconds > 0
        for future in receiving:
            received = future.result()
            assert list(received) == list(tensors)
            for name, tensor in tensors.items():
                assert torch.equal(received[name], tensor), name


def test_another_version_is_refused_before_its_weights_are_used():
    ranks = Ranks(timeout_s=1.0)
    receiving = ranks.start_receiving(version=7)
    with pytest.raises(WeightSyncError, match=r"rank 0 of 3, sending .*did not take part"):
        ranks.send(fill_from(TENSORS), 6)
    for rank, future in enumerate(receiving, start=1):
        with pytest.raises(WeightSyncError, match=f"rank {rank} of 3 .* version 6 instead of 7"):
            future.result()


def damage_bucket_2(transport, monkeypatch):
    broadcast = transport.broadcast

    def damaging(buffer, *, what):
        damaged = buffer.clone()
        damaged[0] ^= "bucket 2" in what
        return broadcast(damaged, what=what)

    monkeypatch.setattr(transport, "broadcast", damaging)


DAMAGED = r"rank {} of {}{} received other bytes.* in bucket 2 of 3, which holds head"


def test_every_receiver_names_a_damaged_bucket(monkeypatch):
    ranks = Ranks()
    damage_bucket_2(ranks.senders[0]._transport, monkeypatch)
    receiving = ranks.start_receiving()
    ranks.send(fill_from(TENSORS), 0)
    for rank, future in enumerate(receiving, start=1):
        with pytest.raises(WeightSyncError, match=DAMAGED.format(rank, 3, "")):
            future.result()


def test_damage_in_one_connection_is_named_in_that_one_only(monkeypatch):
    ranks = Ranks(apart=True)
    damage_bucket_2(ranks.senders[1]._transport, monkeypatch)
    whole, damaged = ranks.start_receiving()
    ranks.send(fill_from(TENSORS), 0)
    for name, tensor in whole.result().items():
        assert torch.equal(tensor, TENSORS[name]), name
    with pytest.raises(WeightSyncError, match=DAMAGED.format(1, 2, " in connection 1 of 2")):
        damaged.result()


def test_a_sender_that_never_sends_is_named_with_phase_and_bucket(monkeypatch):
    monkeypatch.setattr(transport, "EXTRA_RECEIVER_S", 0.0)  # no sender to wait for
    ranks = Ranks(timeout_s=1.0)
    errors = [future.exception() for future in ranks.start_receiving()]
    assert all(isinstance(error, WeightSyncError) for error in errors)
    for rank, error in enumerate(errors, start=1):
        assert f"weight sync rank {rank} of 3, waiting for the sender: " in str(error)
        assert "did not take part within 1 s" in str(error)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_receiver_that_misses_an_update_is_named(missing):
    ranks = Ranks(timeout_s=1.0)
    for version in range(2):  # what was left of a meeting is not taken for the next
        receiving = ranks.start_receiving(version)
        ranks.send(fill_from(TENSORS), version)
        for future in receiving:
            future.result()
    here = ranks.receivers[2 - missing]
    receiving = ranks.threads.submit(receive, here, 2, True)
    message = rf"rank 0 of 3, meeting .*did not take part within 1 s \(without rank {missing}\)"
    with pytest.raises(WeightSyncError, match=message):
        ranks.send(fill_from(TENSORS), 2)
    assert not receiving.done(), "who came is not to be taken for who is missing"
    with pytest.raises(WeightSyncError, match=rf"rank {3 - missing} of 3, waiting for the sender"):
        receiving.result()


def test_ranks_that_wait_for_a_lost_one_give_up_when_their_store_closes():
    ranks = Ranks(timeout_s=600.0)
    filled = []

    def fill(bucket, buffer):
        filled.append(bucket.index)

    waiting = [
        ranks.threads.submit(receive, ranks.receivers[0], 0, True),
        ranks.threads.submit(ranks.send, fill, 0),
    ]
    ranks.stores.clear()
    for rank in waiting:
        with pytest.raises(WeightSyncError, match=r"failed after"):
            rank.result()
    assert filled == [0, 1, 2], "other ranks of the policy take part in filling every bucket"


def test_a_sender_that_stops_is_named_with_phase_and_bucket():
    ranks = Ranks(timeout_s=1.0)
    receiving = ranks.start_receiving()

    def fill(bucket, buffer):
        if bucket.index == 1:
            raise KeyError("the policy is out of order")

    with pytest.raises(KeyError):
        ranks.send(fill, 0)
    for rank, future in enumerate(receiving, start=1):
        message = rf"rank {rank} of 3, waiting for bucket 1 \(.*did not take part within 1 s"
        with pytest.raises(WeightSyncError, match=message):
            future.result()


def test_a_receiver_that_never_connects_is_a_named_timeout():
    store = serve_store(LOOPBACK, 1.0)
    message = r"weight sync rank 0 of 2, connecting to 127\.0\.0\.1:\d+: .* within 1 s"
    with pytest.raises(WeightSyncError, match=message):
        WeightSender(connection(store, world_size=2, timeout_s=1.0), CPU)


@pytest.mark.parametrize(
    ("num_engines", "tensor_parallel_size", "engines_per_gpu"),
    [(1, 1, 1), (3, 2, 1), (2, 1, 2), (4, 1, 2), (6, 1, 3)],
)
def test_every_worker_has_an_endpoint_and_engines_on_one_gpu_have_different_connections(
    num_engines, tensor_parallel_size, engines_per_gpu
):
    connections = list(range(engines_per_gpu))
    endpoints = endpoints_of_tensors(
        connections,
        ranks_of_connections(range(num_engines), engines_per_gpu),
        workers_per_engine=tensor_parallel_size,
    )
    world_size = 1 + num_engines * tensor_parallel_size // engines_per_gpu
    for connection in connections:
        ranks = [e.rank for engine in endpoints for e in engine if e.connection == connection]
        assert ranks == list(range(1, world_size))
    for start in range(0, num_engines, engines_per_gpu):
        of_gpu = [engine[0].connection for engine in endpoints[start : start + engines_per_gpu]]
        assert len(set(of_gpu)) == engines_per_gpu
    assert all(len({e.connection for e in engine}) == 1 for engine in endpoints)


def test_each_shard_has_a_connection_with_one_worker_of_every_engine():
    assert endpoints_of_shards(["a", "b"], range(3)) == [
        [("a", 1), ("b", 1)],
        [("a", 2), ("b", 2)],
        [("a", 3), ("b", 3)],
    ]


def test_an_engine_that_is_lost_leaves_its_place_and_no_gap_in_a_connection():
    ranks = ranks_of_connections([0, 1, 3], 2)
    assert ranks == [[0], [1, 3]]
    assert endpoints_of_tensors(["a", "b"], ranks, workers_per_engine=2) == [
        [("a", 1), ("a", 2)],
        [("b", 1), ("b", 2)],
        [],
        [("b", 3), ("b", 4)],
    ]
    assert endpoints_of_shards(["a"], [0, 2]) == [[("a", 1)], [], [("a", 2)]]


@pytest.mark.parametrize(
    ("policy", "num_workers", "expected"),
    [
        ({}, 2, [0, 0]),
        ({"tensor_parallel_size": 2}, 2, [0, 1]),
        ({"tensor_parallel_size": 4}, 2, [0, 2]),
        ({"tensor_parallel_size": 2}, 4, [0, 0, 1, 1]),
        # Replicas share the work; rank 0 and 2 have the same slice of the model.
        ({"world_size": 4, "tensor_parallel_size": 2}, 4, [0, 2, 1, 3]),
        ({"world_size": 4, "tensor_parallel_size": 2}, 2, [0, 1]),
        ({"world_size": 2}, 4, [0, 1, 0, 1]),
        # Ranks 0 and 1 are the first stage.
        ({"world_size": 4, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 2, [0, 1]),
    ],
)
def test_a_rank_that_has_a_shard_sends_it(policy, num_workers, expected):
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, **policy}
    sizes.setdefault("world_size", sizes["tensor_parallel_size"])
    assert senders_of_shards(num_workers, **sizes) == expected


def test_an_unknown_transport_lists_the_known():
    with pytest.raises(
        ValueError, match=r"unknown weight transport 'smoke'.*Known: .*gloo, ipc, nccl"
    ):
        make_transport("smoke", CPU)
