"""Streams of prompts that are all in memory."""

from __future__ import annotations

import random

from rlsys.data.streams.base import PromptStream
from rlsys.types import Prompt


class InMemoryPrompts(PromptStream):
    """A stream of prompts: one epoch after the other, each a permutation of all.

    Example:
        source = InMemoryPrompts(prompts, shuffle=True, seed=1)
        batch = source.take(8)              # may span two epochs
        state = source.state_dict()         # JSON
    """

    def __init__(self, prompts: list[Prompt], *, shuffle: bool, seed: int):
        """With `shuffle` every epoch has an order of its own, without it the order of `prompts`."""
        assert prompts, "loading refuses data that leaves no prompt"
        self.prompts = prompts
        self.shuffle = shuffle
        self.seed = seed
        self._order = (-1, list[int]())  # of the epoch that the last prompt was in

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far."""
        return self.num_taken / len(self.prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts, which stand at positions num_taken to num_taken + n - 1."""
        first = self.num_taken
        self.num_taken += n
        return [self._at(position) for position in range(first, first + n)]

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self.prompts))
        if self.shuffle:
            if epoch != self._order[0]:
                order = list(range(len(self.prompts)))
                random.Random(f"{self.seed}:{epoch}").shuffle(order)
                self._order = epoch, order
            index = self._order[1][index]
        return self.prompts[index]
