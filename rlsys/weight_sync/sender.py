"""The sending side of a weight sync: runs on the policy ranks that send."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlsys.weight_sync.checksum import FiniteChecksums
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import Bucket
from rlsys.weight_sync.transport import WeightSyncError, make_transport

Fill = Callable[[Bucket, torch.Tensor], None]
"""Writes the tensors of a bucket into a buffer [nbytes] uint8, where `Bucket.views` has them; on a
GPU in the current stream. It is called for the buckets in their order, and a bucket always comes
with the same buffer."""


def sending_memory(connections: Sequence[Connection], device: torch.device) -> torch.Tensor:
    """Two buckets [2, nbytes] uint8, shared by all connections of a sending rank.

    It is [1, nbytes] if every connection has a single bucket.
    """
    plans = [connection.buckets() for connection in connections]
    # Zeros: bytes between tensors are sent too, and should be the same in every run.
    return make_transport(connections[0].transport, device).sending_memory(
        min(2, max(map(len, plans))),
        max(bucket.nbytes for buckets in plans for bucket in buckets),
    )


class WeightSender:
    """Rank 0 of a connection; connects when it is made.

    An update is a barrier that announces the policy version, a broadcast of each bucket and, with
    `verify`, a broadcast of the buckets' checksums; their pass also finds what is not finite. A
    rank with several connections serves one after the other. Sending to all at once would not be
    faster: one broadcast already fills the link to the GPU that their engines share.

    Order on a GPU: everything but the broadcasts runs in the current stream, in which the optimizer
    wrote the weights and will write them again. A broadcast starts after the work that this stream
    held when it was requested, so never before its bucket is filled. A buffer is filled again after
    the wait for its last broadcast, which makes the stream wait. While a bucket is being sent, its
    checksum is computed, which only reads, and the next bucket is filled in the other buffer. The
    host runs ahead of all this and waits once, at the end.

    Args:
        device: where the policy's weights are.
        memory: from `sending_memory`, to share among senders that take turns; None makes its own.

    Raises:
        WeightSyncError: not all ranks came in time.
    """

    def __init__(
        self, connection: Connection, device: torch.device, memory: torch.Tensor | None = None
    ):
        self._buckets = connection.buckets()
        self._checksums = FiniteChecksums(self._buckets) if connection.verify else None
        self._memory = sending_memory([connection], device) if memory is None else memory
        self._transport = make_transport(connection.transport, device)
        self._transport.connect(connection, rank=0, memory=self._memory)

    @torch.no_grad()
    def send(self, fill: Fill, version: int) -> float:
        """Send what `fill` writes as the weights of policy version `version`.

        Returns:
            Seconds from the start of the first bucket's broadcast, when all receivers are ready,
            to the end of the last one.

        Raises:
            WeightSyncError: a receiver did not take part in time, or is gone. All buckets are
                filled nevertheless.
        """
        self._num_filled = 0
        try:
            return self._send(fill, version)
        except WeightSyncError:
            while self._num_filled < len(self._buckets):  # other ranks take part in filling
                self._fill_next(fill)
            raise

    def _send(self, fill: Fill, version: int) -> float:
        self._fill_next(fill)
        self._transport.barrier(version, what="meeting the receivers")
        watch = Stopwatch(self._transport.buffer_device)
        waits: list[Callable[[], None]] = []
        checksums = []
        for bucket in self._buckets:
            buffer = self._buffer(bucket)
            if len(waits) > 1:  # for the bucket that was last in this buffer
                waits.pop(0)()
            if bucket.index > 0:
                self._fill_next(fill)
            waits.append(self._transport.broadcast(buffer, what=f"sending {bucket}"))
            if self._checksums is not None:
                checksums.append(self._checksums.add(bucket, buffer))
        for wait in waits:
            wait()
        watch.stop()
        if self._checksums is not None:
            numbers = torch.stack(checksums).view(torch.uint8)
            self._transport.broadcast(numbers, what="sending the checksums")()
        return watch.seconds()

    def nonfinite(self) -> list[str]:
        """Names of the tensors of the last `send` that hold NaNs or infinities; [] if not verified.

        What was sent has arrived: nothing may sample with it.
        """
        return [] if self._checksums is None else self._checksums.nonfinite()

    def _fill_next(self, fill: Fill) -> None:
        bucket = self._buckets[self._num_filled]
        self._num_filled += 1
        fill(bucket, self._buffer(bucket))

    def _buffer(self, bucket: Bucket) -> torch.Tensor:
        return self._memory[bucket.index % 2, : bucket.nbytes]


class Stopwatch:
    """Seconds from its construction to `stop`; on a GPU, of the current stream."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._start = self._read()

    def stop(self) -> None:
        """End the measurement; the host does not wait for a GPU."""
        self._end = self._read()

    def seconds(self) -> float:
        """The measured seconds; the host waits until the GPU has stopped."""
        if not self._on_gpu:
            return float(self._end - self._start)
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3

    def _read(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
