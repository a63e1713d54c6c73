"""The receiving side of a weight sync: lives in every process that holds an engine's model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rlsys.weight_sync.checksum import as_numbers, checksum
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import Bucket
from rlsys.weight_sync.transport import join


class WeightReceiver:
    """Receives what a WeightSender sends. Joins the group when created.

    Args:
        rank: 1 or higher, in the group.
        device: where the receiving model is.

    Raises:
        WeightSyncError: not all ranks came in time.
    """

    def __init__(self, connection: Connection, device: torch.device, *, rank: int):
        assert rank > 0, "rank 0 is the sender"
        self._buckets = connection.buckets()
        self._verify = connection.verify
        self._checksums: list[torch.Tensor] = []
        self._transport = join(connection, rank, device)

    @property
    def checksums(self) -> list[int]:
        """Per bucket of the last update, empty without `verify`."""
        return as_numbers(self._checksums)

    def receive(self, *, keep: bool) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The (name, tensor) pairs of each bucket, in the transport's memory.

        The next bucket is on its way while one is used.

        Args:
            keep: every bucket has memory of its own, for those who use tensors later. Otherwise
                two buffers take turns: a bucket is gone when the next one is asked for.

        Raises:
            WeightSyncError: the sender did not send in time, or is gone.
        """
        self._checksums = []
        largest = max(bucket.nbytes for bucket in self._buckets)
        memory = [] if keep else [self._new_buffer(largest) for _ in range(2)]
        ahead: tuple[Bucket, torch.Tensor, Callable[[], None]] | None = None
        for bucket in self._buckets:
            if keep:
                buffer = self._new_buffer(bucket.nbytes)
            else:
                buffer = memory[bucket.index % 2][: bucket.nbytes]
            # Without keep, into memory that the bucket before last had: whoever used it is done, on
            # a GPU in the current stream, which this broadcast waits for.
            wait = self._transport.broadcast(buffer, what=f"waiting for {bucket}")
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = bucket, buffer, wait
        assert ahead is not None, "a plan has at least one bucket"
        yield self._arrived(*ahead)

    def _arrived(
        self, bucket: Bucket, buffer: torch.Tensor, wait: Callable[[], None]
    ) -> list[tuple[str, torch.Tensor]]:
        wait()
        if self._verify:
            self._checksums.append(checksum(buffer))
        return bucket.views(buffer)

    def _new_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._transport.buffer_device)
