"""Sender and receivers over a real gloo group of this process's threads."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch

from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import TensorMeta
from rlsys.weight_sync.receiver import WeightReceiver
from rlsys.weight_sync.sender import WeightSender
from rlsys.weight_sync.transport import LOOPBACK, WeightSyncError, make_transport, serve_store

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


def connection(store, *, world_size, timeout_s=20.0):
    return Connection(
        metadata=METADATA,
        transport="auto",
        address=LOOPBACK,
        port=store.port,
        world_size=world_size,
        bucket_bytes=400,
        verify=True,
        in_place=False,
        timeout_s=timeout_s,
    )


class Group:
    """One sender and two receivers that have met."""

    def __init__(self, *, timeout_s=20.0):
        self.store = serve_store(LOOPBACK, timeout_s)
        agreed = connection(self.store, world_size=3, timeout_s=timeout_s)
        self.threads = ThreadPoolExecutor(3)
        sender = self.threads.submit(WeightSender, agreed, CPU)
        receivers = [self.threads.submit(WeightReceiver, agreed, CPU, rank=rank) for rank in (1, 2)]
        self.sender = sender.result()
        self.receivers = [receiver.result() for receiver in receivers]

    def start_receiving(self):
        return [
            self.threads.submit(lambda receiver=receiver: dict(chain(*receiver.receive(keep=True))))
            for receiver in self.receivers
        ]


def test_every_receiver_gets_equal_bits_and_checksums_again_and_again():
    group = Group()
    for scale in (1, 3):  # a second update through the same connection
        tensors = {name: tensor * scale for name, tensor in TENSORS.items()}
        receiving = group.start_receiving()
        sent = group.sender.send(tensors.items())
        assert len(sent) == 3
        for future, receiver in zip(receiving, group.receivers, strict=True):
            received = future.result()
            assert receiver.checksums == sent
            assert list(received) == list(tensors)
            for name, tensor in tensors.items():
                assert torch.equal(received[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer.k"), r"expected layer\.k \[3, 8\] float16, got head"),
        (lambda t: t.update(norm=torch.zeros(9).bfloat16()), r"norm \[8\] .* got norm \[9\]"),
        (lambda t: t.update(norm=torch.zeros(8)), r"norm \[8\] bfloat16, got norm \[8\] float32"),
        (lambda t: t.pop("head"), "expected head .* got nothing"),
        (lambda t: t.update(bias=torch.zeros(1)), "'bias', which was not announced"),
    ],
)
def test_other_tensors_than_announced_are_refused_by_name(change, message):
    store = serve_store(LOOPBACK, 20.0)
    sender = WeightSender(connection(store, world_size=1), CPU)
    tensors = dict(TENSORS)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        sender.send(tensors.items())


def test_a_sender_that_never_sends_is_named_with_phase_and_bucket():
    group = Group(timeout_s=1.0)
    errors = [future.exception() for future in group.start_receiving()]
    assert all(isinstance(error, WeightSyncError) for error in errors)
    for rank, error in enumerate(errors, start=1):
        assert f"weight sync rank {rank} of 3, waiting for bucket 0 (" in str(error)
    assert "did not take part within 1 s" in str(errors[0])


def test_a_receiver_that_never_connects_is_a_named_timeout():
    store = serve_store(LOOPBACK, 1.0)
    message = r"weight sync rank 0 of 2, connecting to 127\.0\.0\.1:\d+: .* within 1 s"
    with pytest.raises(WeightSyncError, match=message):
        WeightSender(connection(store, world_size=2, timeout_s=1.0), CPU)


def test_an_unknown_transport_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown weight transport 'smoke'.*Known: gloo"):
        make_transport("smoke", CPU)
