"""Several streams, mixed by weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rlsys.data.streams.base import Stream, T


class Mixed(Stream[T]):
    """A stream that draws for each prompt or sample which of several streams it comes from.

    The stream at position p is drawn with probability weight / sum of weights by a random number
    that depends on the seed and on p alone. Each stream goes through its own data in its own
    epochs, so a small one with a large weight repeats while a large one is in its first pass.
    """

    def __init__(self, streams: Sequence[Stream[T]], weights: Sequence[float], *, seed: int):
        """Mix `streams` by one positive weight for each."""
        assert len(streams) == len(weights)
        self._streams = list(streams)
        self._weights = list(weights)
        self._seed = seed

    @property
    def epoch(self) -> float:
        """Fewest passes that a stream made over its data."""
        return min(stream.epoch for stream in self._streams)

    def take(self, n: int) -> list[T]:
        """The next `n` prompts or samples."""
        rows = []
        for position in range(self.num_taken, self.num_taken + n):
            drawing = random.Random(f"{self._seed}:mix:{position}")
            [stream] = drawing.choices(self._streams, self._weights)
            rows += stream.take(1)
        self.num_taken += n
        return rows

    def metrics(self) -> dict[str, float]:
        """The sums over the streams."""
        found = [stream.metrics() for stream in self._streams]
        return {name: sum(metrics[name] for metrics in found) for name in found[0]}

    def state_dict(self) -> dict[str, Any]:
        """The state of the mix and of each stream, in JSON's types."""
        return super().state_dict() | {"streams": [s.state_dict() for s in self._streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""
        super().load_state_dict(state)
        for stream, own in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(own)
