"""The receiving side of a weight sync: lives in every process that holds an engine's model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rlsys.weight_sync.checksum import as_numbers, checksum, compare_checksums
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import Bucket
from rlsys.weight_sync.transport import WeightSyncError, join


class WeightReceiver:
    """Receives what a WeightSender sends. Joins a group when created.

    An update is `receive`, to its end, and then `check`. Until the sender is there, the GPU has
    nothing to do: engines that share it are sent to one after the other.

    Order, on a GPU: whoever uses a bucket does so in the current stream. A broadcast starts after
    what that stream held when it was asked for; so into a buffer that two buckets share, the second
    comes after the first was used. Its checksum and its users come after the wait for it.

    Args:
        rank: 1 or higher, in the group.
        device: where the receiving model is.
        group: which of the connection's groups it joins.

    Raises:
        WeightSyncError: not all ranks came in time.
    """

    def __init__(self, connection: Connection, device: torch.device, *, rank: int, group: int = 0):
        assert rank > 0, "rank 0 is the sender"
        self._buckets = connection.buckets()
        self._verify = connection.verify
        self._checksums: list[torch.Tensor] = []
        self._memory: list[torch.Tensor] = []
        self._transport = join(connection, rank, device, group=group)

    def receive(self, version: int, *, keep: bool) -> Iterator[tuple[Bucket, torch.Tensor]]:
        """Each bucket with its buffer [nbytes] uint8, in the transport's memory; see Bucket.views.

        The next bucket is on its way while one is used.

        Args:
            version: of the policy, whose weights these have to be.
            keep: every bucket has memory of its own, for those who use tensors later. Otherwise
                two buffers take turns, in every update the same one for the same bucket: a bucket
                is gone when the next one is asked for.

        Raises:
            WeightSyncError: the sender did not send in time, is gone, or sends another version.
        """
        self._checksums = []
        sent = self._transport.meet(version, what="waiting for the sender")
        if sent != version:
            raise WeightSyncError(
                f"{self._transport.name} is sent the weights of version {sent} instead of {version}"
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
        """Whether what has been received is what was sent, where that is to be verified.

        Raises:
            WeightSyncError: it is not; the message names the first bucket that is damaged.
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
