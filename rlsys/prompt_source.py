"""Which prompt comes next: a seeded, endless stream that can be saved and continued."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

from rlsys.types import Prompt, RolloutGroup


class PromptSource:
    """An endless stream of training prompts: one epoch after the other, each a permutation of all.

    A prompt's place in the stream, counted from 0, never comes again; `num_taken` is the place of
    the next one. What comes depends on the seed and on what happened to the stream before, never
    on time, so a stream that loads the state of another goes on exactly as that one would have.

    Example:
        source = PromptSource(prompts, shuffle=True, seed=1)
        batch = source.take(8)              # may span two epochs
        state = source.state_dict()         # JSON
    """

    def __init__(self, prompts: list[Prompt], *, shuffle: bool, seed: int):
        """`shuffle` puts every epoch into an order of its own; otherwise it is that of the rows."""
        assert prompts, "data that leaves no prompt is refused when it is loaded"
        self.prompts = prompts
        self.shuffle = shuffle
        self.seed = seed
        self.num_taken = 0

    @property
    def epoch(self) -> float:
        """Passes over the training data that were taken so far."""
        return self.num_taken / len(self.prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts, which stand at places num_taken to num_taken + n - 1."""
        first = self.num_taken
        self.num_taken += n
        return [self._at(place) for place in range(first, first + n)]

    def observe(self, group: RolloutGroup) -> None:
        """Hear how a prompt of the stream was answered; called once for every scored group.

        This stream does not listen.
        """

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as JSON has it."""
        return {"num_taken": self.num_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""
        self.num_taken = state["num_taken"]

    def _at(self, place: int) -> Prompt:
        epoch, index = divmod(place, len(self.prompts))
        if self.shuffle:
            index = _epoch_order(len(self.prompts), self.seed, epoch)[index]
        return self.prompts[index]


@lru_cache(maxsize=4)
def _epoch_order(num_prompts: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_prompts))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
