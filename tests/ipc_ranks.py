"""Ranks of a weight sync over "ipc" in processes of their own, on CPU or on one GPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from rlsys.weight_sync.connection import Connection, whole_tensors
from rlsys.weight_sync.plan import TensorMeta
from rlsys.weight_sync.receiver import WeightReceiver
from rlsys.weight_sync.sender import WeightSender
from rlsys.weight_sync.transport import LOOPBACK, WeightSyncError, make_transport, serve_store

NUM_BUCKETS = 7


class Rank:
    """A process that becomes a sender or a receiver again and again."""

    def __init__(self, device):
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, mp_context=context)
        self._device = device

    def start(self):
        """Import what it needs, which takes longer than some deadlines."""
        return self._process.submit(value, 0, 0)

    def connect(self, connection, rank):
        return self._process.submit(_connect, connection, rank, self._device)

    def send(self, version, **how):
        return self._process.submit(_send, version, **how)

    def receive(self, version, **how):
        return self._process.submit(_receive, version, **how)

    def reserved_beside_buckets(self):
        return self._process.submit(_reserved_beside_buckets, self._device)

    def die(self):
        """End the process at once, as when it is killed."""
        return self._process.submit(os._exit, 1)

    def close(self):
        self._process.shutdown(cancel_futures=True)


def connect(sender, receivers, *, numel=100, timeout_s=60.0):
    """Connect ranks; returns the store, which has to live as long as the connection."""
    store = serve_store(LOOPBACK, timeout_s)
    connection = Connection(
        slices=whole_tensors(TensorMeta(f"t{i}", "float32", (numel,)) for i in range(NUM_BUCKETS)),
        sender=0,
        transport="ipc",
        address=LOOPBACK,
        port=store.port,
        world_size=1 + len(receivers),
        bucket_bytes=4 * numel,
        verify=True,
        in_place=False,
        timeout_s=timeout_s,
    )
    ranks = [sender, *receivers]
    for starting in [rank.start() for rank in ranks]:
        starting.result()
    for connecting in [rank.connect(connection, index) for index, rank in enumerate(ranks)]:
        connecting.result()
    return store


def expected(version):
    """What receivers report of an update: see `_receive`."""
    return [[value(version, bucket)] * 4 for bucket in range(NUM_BUCKETS)]


def check_updates(ranks, versions, *, slow, keep, numel=100):
    """Nobody reads or overwrites too early, even if `slow` (sender or receiver) lags behind."""
    sender, *receivers = ranks
    store = connect(sender, receivers, numel=numel)
    for version in versions:
        receiving = [
            receiver.receive(version, keep=keep, slowly=slow == "receiver" and index == 1)
            for index, receiver in enumerate(receivers)
        ]
        sending = sender.send(version, slowly=slow == "sender")
        assert sending.result() > 0
        for future in receiving:
            assert future.result() == expected(version)
    del store


def check_death(mortal, receivers, *, timeout_s, numel=100):
    """Receivers name the bucket that a sender did not send before it died; `mortal` dies."""
    store = connect(mortal, receivers, numel=numel, timeout_s=timeout_s)
    receiving = [receiver.receive(1) for receiver in receivers]
    with pytest.raises(BrokenProcessPool):
        mortal.send(1, dies_at=3).result()
    for rank, future in enumerate(receiving, start=1):
        waited = rf"did not take part within {timeout_s:g} s"
        message = rf"rank {rank} of 3, waiting for bucket 3 \(t3\): .*{waited}"
        with pytest.raises(WeightSyncError, match=message):
            future.result()
    del store


_END: WeightSender | WeightReceiver
"""This process's end of the connection."""


def _connect(connection, rank, device):
    global _END
    device = torch.device(device)
    if rank == 0:
        _END = WeightSender(connection, device)
    else:
        _END = WeightReceiver(connection, device, rank=rank)


def value(version, bucket):
    """What every element of a bucket is."""
    return float(100 * version + bucket)


def _send(version, *, slowly=False, dies_at=None):
    """Send an update; `slowly` writes the halves of each bucket at different times."""

    def fill(bucket, buffer):
        if bucket.index == dies_at:
            os._exit(1)
        [(_, tensor)] = bucket.views(buffer)
        first, second = tensor.chunk(2)
        first.fill_(value(version, bucket.index))
        if slowly:
            _wait(buffer.device)
        second.fill_(value(version, bucket.index))

    return _END.send(fill, version)


def _receive(version, *, keep=False, slowly=False):
    """The lowest and highest element of each bucket, when it comes and after some time."""
    seen = []
    for bucket, buffer in _END.receive(version, keep=keep):
        [(_, tensor)] = bucket.views(buffer)
        at_once = tensor.aminmax()
        if slowly:
            _wait(buffer.device)
        seen.append([*at_once, *tensor.aminmax()])
    _END.check()
    return [[float(number) for number in numbers] for numbers in seen]


def _wait(device):
    """Let time pass; on a GPU in the stream, while the host runs ahead."""
    if device.type == "cuda":
        torch.cuda._sleep(50_000_000)
    else:
        time.sleep(0.05)


def _reserved_beside_buckets(device):
    """Bytes that torch keeps, where buckets were made while it had much to reuse."""
    device = torch.device(device)
    if device.type == "cpu":
        return 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    much = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    del much
    buckets = make_transport("ipc", device).sending_memory(2, 4 << 20)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) - before - buckets.numel()
