"""What a tracker is: four methods and a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

from rlsys.config import Config
from rlsys.registry import Registry
from rlsys.types import RolloutGroup

Metrics = Mapping[str, float | str]
"""Names to numbers; the few texts are for people, such as `remaining_time`."""
Split = Literal["train", "eval", "filtered"]
"""Of a group: trained on, held out, or left out by dynamic sampling."""


class Tracker(ABC):
    """Takes what a run measures and samples. A tracker implements what it cares about."""

    def log_metrics(self, step: int, metrics: Metrics) -> None:  # noqa: B027  optional
        """Take the metrics of a step, 1 to max_steps, or of an evaluation after `step` steps.

        Evaluations have only names that start with "eval/". Numbers may be NaN or infinite.
        """

    def log_completions(  # noqa: B027  optional
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Take one group, once, before the update.

        A group of a batch comes when it gets its place there, one that dynamic sampling left out
        when the batch is full, a held-out one when it is scored. Groups that were given up do not
        come at all.

        `advantages` has G entries, or is None when they are not known (yet).
        """

    def log_warning(self, step: int, text: str) -> None:  # noqa: B027  optional
        """Take something that a person should look into; each is told once a run."""

    @abstractmethod
    def close(self) -> None:
        """Write what is pending and let go of files and connections. Called once."""


TrackerFactory = Callable[[Config, int | None], Tracker]
"""Builds a tracker from the config and the step that the run resumes after, None for a new run."""

trackers: Registry[TrackerFactory] = Registry("tracker")
"""What `tracking.report_to` may name."""
register_tracker = trackers.register


def is_evaluation(metrics: Metrics) -> bool:
    """Whether metrics come from an evaluation and not from a training step."""
    return all(name.startswith("eval/") for name in metrics)
