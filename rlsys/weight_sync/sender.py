"""The sending side of a weight sync: lives in a process of the policy, mostly that of rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rlsys.weight_sync.checksum import checksum
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import Bucket
from rlsys.weight_sync.stopwatch import Stopwatch
from rlsys.weight_sync.transport import Transport, join, make_transport

Fill = Callable[[Bucket, torch.Tensor], None]
"""Writes the tensors of a bucket to where `Bucket.views` has them in a buffer [nbytes] uint8; on a
GPU in the current stream. It is asked for the buckets in their order, and always gets the same
buffer for the same bucket."""


def sending_memory(connections: Sequence[Connection], device: torch.device) -> torch.Tensor:
    """Two buckets [2, nbytes] uint8 for a rank that sends to all of these, or one for all."""
    plans = [connection.buckets() for connection in connections]
    # Zeros: bytes between tensors are sent too, and should be the same in every run.
    return torch.zeros(
        min(2, max(map(len, plans))),
        max(bucket.nbytes for buckets in plans for bucket in buckets),
        dtype=torch.uint8,
        device=make_transport(connections[0].transport, device).buffer_device,
    )


class WeightSender:
    """Sends what a connection says to all its receivers; keeps the memory of two buckets.

    Joins all groups when created, as their rank 0. An update is, for one group after the other, a
    meeting that tells the policy version, a broadcast of each bucket and, with `verify`, one of the
    buckets' checksums: see WeightReceiver. To all groups at once would not be faster, as one
    broadcast takes all of the link to the GPU that their engines share.

    Order, on a GPU: everything but the broadcasts runs in the current stream, in which the
    optimizer wrote the weights and will write them again. A broadcast starts after what that stream
    held when it was asked for, so never before its bucket is filled. A buffer is filled again after
    the wait for its last broadcast, which makes the stream wait. In between, while a bucket is on
    its way, its checksum is computed, which only reads, and the next bucket is filled, which lies
    in the other buffer. The host runs ahead of all of it, and waits once for each group, at the
    end.

    Args:
        device: where the policy's weights are.
        memory: of `sending_memory`, where senders share it that send one after the other.

    Raises:
        WeightSyncError: not all ranks came in time.
    """

    def __init__(
        self, connection: Connection, device: torch.device, memory: torch.Tensor | None = None
    ):
        self._buckets = connection.buckets()
        self._verify = connection.verify
        self._transports = [
            join(connection, 0, device, group=group) for group in range(len(connection.ports))
        ]
        self._device = self._transports[0].buffer_device
        self._memory = memory if memory is not None else sending_memory([connection], device)

    @torch.no_grad()
    def send(self, fill: Fill, version: int) -> float:
        """Send what `fill` gives as the weights of policy version `version`.

        `fill` is asked for all buckets once for each group.

        Returns:
            seconds from the start of the first bucket's broadcast, for which all receivers are
            ready, to the end of the last; the sum over all groups.

        Raises:
            WeightSyncError: a receiver did not take part in time, or is gone.
        """
        return sum(self._send_to(transport, fill, version) for transport in self._transports)

    def _send_to(self, transport: Transport, fill: Fill, version: int) -> float:
        fill(self._buckets[0], self._buffer(self._buckets[0]))
        transport.meet(version, what="meeting the receivers")
        watch = Stopwatch(self._device)
        waits: list[Callable[[], None]] = []
        checksums = []
        for bucket in self._buckets:
            buffer = self._buffer(bucket)
            if len(waits) > 1:  # for the bucket before the last, whose buffer this is
                waits.pop(0)()
            if bucket.index > 0:
                fill(bucket, buffer)
            waits.append(transport.broadcast(buffer, what=f"sending {bucket}"))
            if self._verify:
                checksums.append(checksum(buffer))
        for wait in waits:
            wait()
        watch.stop()
        if self._verify:
            numbers = torch.stack(checksums).view(torch.uint8)
            transport.broadcast(numbers, what="sending the checksums")()
        return watch.seconds()

    def _buffer(self, bucket: Bucket) -> torch.Tensor:
        return self._memory[bucket.index % 2, : bucket.nbytes]
