"""The receiving side of a weight sync: runs in every process that holds a receiving model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rlsys.weight_sync.checksum import as_numbers, checksum, compare_checksums
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import Bucket
from rlsys.weight_sync.transport import WeightSyncError, make_transport


class WeightReceiver:
    """One receiving rank of a connection; connects when it is made.

    An update is `receive`, to its end, and then `check`. The GPU has nothing to do until the sender
    is there: engines that share a GPU receive one after the other.

    Order on a GPU: callers use a bucket in the current stream. A broadcast starts after
    the work that this stream held when it was requested. So where two buckets share a buffer, the
    second arrives after the first was used. The checksum and the use of a bucket come after the
    wait for it.

    Args:
        device: where the receiving model is.
        rank: 1 or higher, in the connection.

    Raises:
        WeightSyncError: not all ranks came in time.
    """

    def __init__(self, connection: Connection, device: torch.device, *, rank: int):
        assert rank > 0, "rank 0 is the sender"
        self._buckets = connection.buckets()
        self._verify = connection.verify
        self._checksums: list[torch.Tensor] = []
        self._memory: list[torch.Tensor] = []
        self._transport = make_transport(connection.transport, device)
        self._transport.connect(connection, rank)

    def receive(self, version: int, *, keep: bool) -> Iterator[tuple[Bucket, torch.Tensor]]:
        """Each bucket with its buffer [nbytes] uint8, in the transport's memory; see Bucket.views.

        The next bucket is on its way while one is used.

        Args:
            version: the policy version that has to arrive.
            keep: True gives each bucket its own memory, for callers that use tensors later. With
                False two buffers take turns: a bucket is gone when the next one is requested. A
                bucket then comes in the same buffer in every update.

        Raises:
            WeightSyncError: the sender did not send in time, is gone, or sends another version.
        """
        self._checksums = []
        sent = self._transport.barrier(version, what="waiting for the sender")
        if sent != version:
            raise WeightSyncError(
                f"{self._transport.name} got the weights of version {sent} instead of {version}"
            )
        ahead: tuple[Bucket, torch.Tensor, Callable[[], None]] | None = None
        for bucket in self._buckets:
            buffer = self._new_buffer(bucket.nbytes) if keep else self._buffer(bucket)
            wait = self._transport.broadcast(buffer, what=f"waiting for {bucket}")
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = bucket, buffer, wait
        assert ahead is not None, "a plan has at least one bucket"
        yield self._arrived(*ahead)

    def check(self) -> None:
        """Compare checksums with the sender, if the connection verifies.

        Raises:
            WeightSyncError: a bucket is damaged; the message names the first one.
        """
        if not self._verify:
            return
        sent = self._new_buffer(8 * len(self._buckets))
        self._transport.broadcast(sent, what="waiting for the checksums")()
        numbers = as_numbers([*sent.view(torch.int64), *self._checksums])
        half = len(numbers) // 2
        compare_checksums(
            self._buckets, numbers[:half], numbers[half:], receiver=self._transport.name
        )

    def _arrived(
        self, bucket: Bucket, buffer: torch.Tensor, wait: Callable[[], None]
    ) -> tuple[Bucket, torch.Tensor]:
        wait()
        if self._verify:
            self._checksums.append(checksum(buffer))
        return bucket, buffer

    def _buffer(self, bucket: Bucket) -> torch.Tensor:
        if not self._memory:
            largest = max(bucket.nbytes for bucket in self._buckets)
            self._memory = [self._new_buffer(largest) for _ in range(min(2, len(self._buckets)))]
        return self._memory[bucket.index % 2][: bucket.nbytes]

    def _new_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._transport.buffer_device)
