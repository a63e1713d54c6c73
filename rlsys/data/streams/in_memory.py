"""Which prompt comes next: a seeded, endless stream that can be saved and continued."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

from rlsys.types import Prompt, RolloutGroup


class PromptStream(Protocol):
    """Where prompts come from: this module's streams, streamed files, difficulty sampling."""

    num_taken: int
    """Prompts taken so far: the place of the next one."""

    @property
    def epoch(self) -> float:
        """Passes over the training data that were taken so far."""

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""

    def observe(self, group: RolloutGroup) -> None:
        """Hear how a prompt of the stream was answered.

        Called once for every group of a batch, and for every one that dynamic sampling left out of
        it. Groups that were given up are not heard of, scored or not.
        """

    def metrics(self) -> dict[str, float]:
        """What there is to tell about the stream; logged at every step."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as JSON has it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""


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
        self._orders: dict[int, list[int]] = {}

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
        """Hear how a prompt of the stream was answered, see PromptStream.

        This stream does not listen.
        """

    def metrics(self) -> dict[str, float]:
        """Nothing but what the epoch says."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as JSON has it."""
        return {"num_taken": self.num_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""
        self.num_taken = state["num_taken"]

    def _at(self, place: int) -> Prompt:
        epoch, index = divmod(place, len(self.prompts))
        if self.shuffle:
            if epoch not in self._orders:
                self._orders = {epoch: _epoch_order(len(self.prompts), self.seed, epoch)}
            index = self._orders[epoch][index]
        return self.prompts[index]


class MixedPrompts:
    """Several streams, mixed by weight: each prompt is of a stream drawn for it.

    The stream at place p is drawn with probability weight / sum of weights by a random number
    that depends on the seed and on p alone. Each stream goes through its own data in its own
    epochs, so a small one with a large weight repeats while a large one is in its first pass.
    """

    def __init__(self, streams: Sequence[PromptStream], weights: Sequence[float], *, seed: int):
        """`weights`: one positive number for each stream."""
        assert len(streams) == len(weights)
        self._streams = list(streams)
        self._weights = list(weights)
        self._seed = seed
        self.num_taken = 0

    @property
    def epoch(self) -> float:
        """Passes over the data, by the stream that had the fewest."""
        return min(stream.epoch for stream in self._streams)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        prompts = []
        for place in range(self.num_taken, self.num_taken + n):
            drawing = random.Random(f"{self._seed}:mix:{place}")
            [stream] = drawing.choices(self._streams, self._weights)
            prompts += stream.take(1)
        self.num_taken += n
        return prompts

    def observe(self, group: RolloutGroup) -> None:
        """Hear how a prompt was answered; this stream does not listen."""

    def metrics(self) -> dict[str, float]:
        """The sums over the streams."""
        found = [stream.metrics() for stream in self._streams]
        return {name: sum(metrics[name] for metrics in found) for name in found[0]}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as JSON has it."""
        return {
            "num_taken": self.num_taken,
            "streams": [stream.state_dict() for stream in self._streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""
        self.num_taken = state["num_taken"]
        for stream, own in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(own)


def _epoch_order(num_prompts: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_prompts))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
