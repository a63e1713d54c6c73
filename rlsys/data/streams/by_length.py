"""Samples of similar length together."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from rlsys.data.streams.base import SampleStream
from rlsys.types import Sample

BATCHES_TOGETHER = 50
"""Most steps whose samples are sorted together: as many as in transformers' LengthGroupedSampler,
which also takes a quarter of an epoch at most."""


class ByLength(SampleStream):
    """A stream that hands out the samples of another one in steps of similar length.

    It takes a group of samples, sorts it by length, cuts it into steps and shuffles these. A group
    ends with the step in which an epoch ends, so each epoch has each sample once, as in the other
    stream, and the last step may begin the next epoch. A group may have a sample several times,
    where `Mixed` repeats a small dataset; its copies go to different steps while there are some.
    """

    def __init__(self, stream: SampleStream, *, num_rows: int, batch_size: int, seed: int):
        """Group the samples of `stream`, which are `num_rows` in an epoch."""
        self._stream = stream
        self._num_rows = num_rows
        self._batch_size = batch_size
        self._seed = seed
        # Of the group that is handed out: the position of its first sample, samples of a step, and
        # the state before it.
        self._first = 0
        self._size = batch_size
        self._before = stream.state_dict()
        self._group: list[Sample] = []

    @property
    def epoch(self) -> float:
        """Passes over the samples, those that wait in the group not counted."""
        taken = self._stream.num_taken
        return self._stream.epoch * self.num_taken / taken if taken else 0.0

    def take(self, n: int) -> list[Sample]:
        """The next `n` samples."""
        samples = []
        for position in range(self.num_taken, self.num_taken + n):
            while position >= self._first + len(self._group):
                self._fill()
            samples.append(self._group[position - self._first])
        self.num_taken += n
        return samples

    def _fill(self) -> None:
        """Take the samples of the next group, whose first steps may have been handed out."""
        if self._group:  # else it is the first one, or that of a checkpoint
            self._first += len(self._group)
            self._size = self._batch_size
        self._before = self._stream.state_dict()
        size, first = self._size, self._first
        epoch_ends = (first // self._num_rows + 1) * self._num_rows
        most = max(1, min(BATCHES_TOGETHER, self._num_rows // (4 * size)))
        number = min(most, -((first - epoch_ends) // size))  # rounded up
        taken = sorted(self._stream.take(number * size), key=lambda sample: -len(sample.token_ids))
        steps = [taken[i : i + size] for i in range(0, len(taken), size)]
        spread_copies(steps)
        random.Random(f"{self._seed}:by-length:{first}").shuffle(steps)
        self._group = [sample for step in steps for sample in step]

    def metrics(self) -> dict[str, float]:
        """The metrics of the other stream."""
        return self._stream.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The group that is handed out, and the state of the other stream before it."""
        own = {"first": self._first, "size": self._size, "stream": self._before}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""
        super().load_state_dict(state)
        self._first, self._size = state["first"], state["size"]
        self._stream.load_state_dict(state["stream"])
        self._group = []


def spread_copies(steps: list[list[Sample]]) -> None:
    """Exchange samples between steps until the copies of each are spread evenly, in place.

    Args:
        steps: equally many samples each, sorted by length, longest first.

    A copy goes to the nearest step with at least two copies fewer. That step has at least one
    sample of which the first step has fewer, since both are equally large, and gives it in return.
    So the sum of squared counts decreases until no step has two copies more than another.
    """
    counts = [Counter(sample.sample_id for sample in step) for step in steps]
    again = any(max(count.values()) > 1 for count in counts)
    while again:
        again = False
        for here, step in enumerate(steps):
            nearest = sorted(range(len(steps)), key=lambda index: abs(index - here))
            for place, sample in enumerate(step):
                name, own = sample.sample_id, counts[here]
                if own[name] < 2:
                    continue
                there = next((i for i in nearest if counts[i][name] <= own[name] - 2), None)
                if there is None:
                    continue
                partner, other = steps[there], counts[there]
                # The samples of nearly the same length come first.
                places = range(len(step)) if there > here else reversed(range(len(step)))
                names = ((i, partner[i].sample_id) for i in places)
                back, returned = next((i, n) for i, n in names if other[n] > own[n])
                step[place], partner[back] = partner[back], sample
                for count, less, more in ((own, name, returned), (other, returned, name)):
                    count[less] -= 1
                    count[more] += 1
                again = True
