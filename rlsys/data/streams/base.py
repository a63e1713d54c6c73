"""The interface of a seeded, endless stream of training rows that can be saved and continued."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeAlias, TypeVar

from rlsys.types import Preference, Prompt, RolloutGroup, Sample, ScoredRow

T = TypeVar("T", bound=Prompt | Sample | Preference | ScoredRow)
"""What a run trains on."""


class Stream(ABC, Generic[T]):
    """A stream of prompts or samples, epoch after epoch.

    The position of one in the stream, counted from 0, never comes again. What comes depends on the
    seed and on what happened to the stream before, never on time, so a stream that loads the state
    of another goes on exactly as that one would have.
    """

    num_taken = 0
    """Prompts or samples taken so far, which is the position of the next one."""

    @property
    @abstractmethod
    def epoch(self) -> float:
        """Passes over the training data so far."""

    @abstractmethod
    def take(self, n: int) -> list[T]:
        """The next `n` prompts or samples."""

    def observe(self, group: RolloutGroup) -> None:
        """Note how a prompt of the stream was answered.

        The caller passes every group of a batch, and every group that dynamic sampling left out of
        a batch, once. It does not pass groups that were given up, scored or not.
        """

    def metrics(self) -> dict[str, float]:
        """Metrics of the stream, logged at every step."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`, in JSON's types."""
        return {"num_taken": self.num_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""
        self.num_taken = state["num_taken"]


PromptStream: TypeAlias = Stream[Prompt]
SampleStream: TypeAlias = Stream[Sample]
