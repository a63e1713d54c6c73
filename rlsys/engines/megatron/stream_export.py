"""The buckets of a weight sync, filled from a stream of whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import Bucket, TensorSlice

Export = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class StreamExport:
    """One rank's part in filling the buckets of one connection, as BucketExport's is.

    Every rank takes part in gathering every tensor, so it is as slow as the export itself.

    Args:
        export: gives whole Hugging Face tensors in order; every rank iterates it to the end.
        connection: its slices are in the order of `export`.
    """

    def __init__(self, export: Export, connection: Connection):
        self._export = export
        self._last = len(connection.buckets()) - 1
        self._items = {piece.meta.name: piece for piece in connection.slices}
        self._stream: Iterator[tuple[str, torch.Tensor]] = iter(())
        self._name = ""
        self._tensor = torch.empty(0)
        """The tensor that the stream gave last, and its name."""

    def fill(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Write the current weights into `buffer` [nbytes] uint8: the sender's part.

        The buckets of an update come in order.
        """
        if bucket.index == 0:
            self._stream, self._name = self._export(), ""
        for name, view in bucket.views(buffer):
            item = self._items[name]
            while self._name != item.tensor.name:
                self._name, self._tensor = next(self._stream)
            view.copy_(item.within(self._tensor, TensorSlice.whole(item.tensor)))
        if bucket.index == self._last:
            self._tensor = torch.empty(0)
            for _ in self._stream:  # the other ranks gather the rest, too
                pass

    def contribute(self) -> None:
        """Take part in gathering: the other ranks' part."""
        for _ in self._export():
            pass
