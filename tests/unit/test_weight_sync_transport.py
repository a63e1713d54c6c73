"""Sender and receivers over a real gloo group of this process's threads."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch

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
METADATA = [
    TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    for name, tensor in TENSORS.items()
]
PLAN = {"bucket_bytes": 400, "verify": True}


class Group:
    """One sender and two receivers that have met."""

    def __init__(self, *, timeout_s=20.0):
        self.sender = WeightSender(METADATA, transport=make_transport("gloo", CPU), **PLAN)
        self.receivers = [
            WeightReceiver(METADATA, transport=make_transport("auto", CPU), **PLAN)
            for _ in range(2)
        ]
        self.store = serve_store(LOOPBACK, timeout_s)
        meeting = (LOOPBACK, self.store.port)
        options = {"world_size": 3, "timeout_s": timeout_s}
        self.threads = ThreadPoolExecutor(3)
        connecting = [self.threads.submit(self.sender.connect, *meeting, **options)]
        for rank, receiver in enumerate(self.receivers, start=1):
            connecting.append(self.threads.submit(receiver.connect, *meeting, rank=rank, **options))
        for future in connecting:
            future.result()

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
    sender = WeightSender(METADATA, transport=make_transport("gloo", CPU), **PLAN)
    sender.connect(LOOPBACK, store.port, world_size=1, timeout_s=20.0)
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
    sender = WeightSender(METADATA, transport=make_transport("gloo", CPU), **PLAN)
    message = r"weight sync rank 0 of 2, connecting to 127\.0\.0\.1:\d+: .* within 1 s"
    with pytest.raises(WeightSyncError, match=message):
        sender.connect(LOOPBACK, store.port, world_size=2, timeout_s=1.0)


def test_an_unknown_transport_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown weight transport 'smoke'.*Known: gloo"):
        make_transport("smoke", CPU)
