"""Samples of similar length together."""

from __future__ import annotations

import random
from typing import Any

from rlsys.data.streams.base import SampleStream
from rlsys.types import Sample

BATCHES_TOGETHER = 50
"""Steps whose samples are sorted together: transformers' LengthGroupedSampler takes as many."""


class ByLength(SampleStream):
    """A stream that hands out the samples of another one in steps of similar length.

    It takes the samples of BATCHES_TOGETHER steps, sorts them by length, cuts them into steps and
    shuffles these. Each sample still comes once an epoch, up to a group of steps.
    """

    def __init__(self, stream: SampleStream, *, batch_size: int, seed: int):
        self._stream = stream
        self._batch_size = batch_size
        self._seed = seed
        self._start = stream.state_dict()  # of the group that is handed out
        self._group: list[Sample] = []

    @property
    def epoch(self) -> float:
        """Passes over the samples, those that wait in the group not counted."""
        waiting = self._group_size - self.num_taken % self._group_size if self._group else 0
        taken = self._stream.num_taken
        return self._stream.epoch * (taken - waiting) / taken if taken else 0.0

    @property
    def _group_size(self) -> int:
        return BATCHES_TOGETHER * self._batch_size

    def take(self, n: int) -> list[Sample]:
        """The next `n` samples."""
        samples = []
        for position in range(self.num_taken, self.num_taken + n):
            number, index = divmod(position, self._group_size)
            if index == 0 or not self._group:
                self._fill(number)
            samples.append(self._group[index])
        self.num_taken += n
        return samples

    def _fill(self, number: int) -> None:
        """Take the samples of group `number`, whose first steps may have been handed out."""
        self._start = self._stream.state_dict()
        size = self._batch_size
        taken = sorted(
            self._stream.take(self._group_size), key=lambda sample: -len(sample.token_ids)
        )
        steps = [taken[i : i + size] for i in range(0, len(taken), size)]
        random.Random(f"{self._seed}:by-length:{number}").shuffle(steps)
        self._group = [sample for step in steps for sample in step]

    def metrics(self) -> dict[str, float]:
        """The metrics of the other stream."""
        return self._stream.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The state of the other stream before the group that is handed out."""
        is_between = not self.num_taken % self._group_size
        stream = self._stream.state_dict() if is_between else self._start
        return super().state_dict() | {"stream": stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""
        super().load_state_dict(state)
        self._stream.load_state_dict(state["stream"])
        self._group = []
