"""Streams of prompts or samples that are all in memory."""

from __future__ import annotations

import random

from rlsys.data.streams.base import Stream, T


class InMemory(Stream[T]):
    """A stream of prompts or samples: one epoch after the other, each a permutation of all.

    Example:
        source = InMemory(prompts, shuffle=True, seed=1)
        batch = source.take(8)              # may span two epochs
        state = source.state_dict()         # JSON
    """

    def __init__(self, rows: list[T], *, shuffle: bool, seed: int):
        """With `shuffle` every epoch has an order of its own, without it the order of `rows`."""
        assert rows, "loading refuses data that leaves nothing"
        self.rows = rows
        self.shuffle = shuffle
        self.seed = seed
        self._order = (-1, list[int]())  # of the epoch that the last row was in

    @property
    def epoch(self) -> float:
        """Passes over the rows so far."""
        return self.num_taken / len(self.rows)

    def take(self, n: int) -> list[T]:
        """The next `n` rows, which stand at positions num_taken to num_taken + n - 1."""
        first = self.num_taken
        self.num_taken += n
        return [self._at(position) for position in range(first, first + n)]

    def _at(self, position: int) -> T:
        epoch, index = divmod(position, len(self.rows))
        if self.shuffle:
            if epoch != self._order[0]:
                order = list(range(len(self.rows)))
                random.Random(f"{self.seed}:{epoch}").shuffle(order)
                self._order = epoch, order
            index = self._order[1][index]
        return self.rows[index]
