"""The interface of trackers: methods that record, and close."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlsys.config import RunConfig
from rlsys.registry import Registry
from rlsys.timeline.spans import Span
from rlsys.types import Device, RolloutGroup, TrainBatch

Metrics = Mapping[str, float | str]
"""Metric name -> number; a few values are texts for people, such as `remaining_time`."""
Split = Literal["train", "eval", "filtered"]
"""The kind of a group: trained on, held out, or left out by dynamic sampling."""


@dataclass(frozen=True, slots=True)
class HealthWarning:
    """A problem of a run that begins or is over; docs/health.md explains each."""

    step: int
    warning: str
    """Its name, which is also that of its field in `tracking.health`."""
    metric: str
    value: float
    threshold: float
    """The value is on the wrong side of it, or was."""
    message: str
    look_at: str
    """What to do."""
    event: Literal["begin", "end"] = "begin"

    @property
    def text(self) -> str:
        """What the console prints."""
        return f"{self.message} {self.look_at}".strip()

    def row(self) -> dict[str, Any]:
        """The line of warnings.jsonl."""
        return {"time": time.time(), **asdict(self)}


class Tracker(ABC):
    """Records the metrics and completions of a run. A tracker implements the methods it needs.

    Those of `tracking.report_to` are made and called in a thread of their own, in order; a call
    that raises is made again later, see rlsys.tracking.background.
    """

    def begin(self, config: RunConfig, device: Device) -> None:  # noqa: B027  optional
        """Note that the roles have started; called once, before the first step.

        Args:
            config: of the run, with what only the machine decides.
            device: that the run computes on.
        """

    def log_metrics(self, step: int, metrics: Metrics) -> None:  # noqa: B027  optional
        """Record the metrics of a step, 1 to max_steps, or of an evaluation after `step` steps.

        All names of an evaluation start with "eval/". Numbers may be NaN or infinite.
        """

    def log_completions(  # noqa: B027  optional
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Record one group, once, before the update.

        The call comes when a group gets its place in the batch. For a group that dynamic sampling
        left out it comes when the batch is full, for a held-out group when it is scored. Groups
        that were given up are not recorded.

        Args:
            step: the training step, or the steps taken before the evaluation.
            group: prompt, completions and rewards.
            advantages: [G], or None if they are not known.
            split: the kind of the group.
        """

    def log_tokens(  # noqa: B027  optional
        self, step: int, groups: Sequence[RolloutGroup], batch: TrainBatch
    ) -> None:
        """Record the tokens of a training step's completions, after its update.

        Args:
            step: the training step.
            groups: P groups, which `log_completions` had before.
            batch: built from them, with advantages.
        """

    def log_timeline(self, spans: Sequence[Span]) -> None:  # noqa: B027  optional
        """Record what actors did. Calls come a few times a step; all spans are of one step."""

    def log_warning(self, step: int, text: str) -> None:  # noqa: B027  optional
        """Record a problem that a person should look into, once when it begins, as a text."""

    def log_health(self, warning: HealthWarning) -> None:
        """Record a problem that a person should look into, or that it is over."""
        self.log_warning(warning.step, warning.text)

    @abstractmethod
    def close(self) -> None:
        """Write what is pending and release files and connections. Called once."""


TrackerFactory = Callable[[RunConfig, int | None], Tracker]
"""Builds a tracker from the config and the step after which the run resumes (None: a new run)."""

trackers: Registry[TrackerFactory] = Registry("tracker")
"""The trackers that `tracking.report_to` may name."""
register_tracker = trackers.register


def run_name(config: RunConfig) -> str:
    """The name of a run in trackers."""
    return config.tracking.run_name or Path(config.output_dir).resolve().name


def numbers_of(metrics: Metrics) -> dict[str, float]:
    """The metrics without those that are texts."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


def is_evaluation(metrics: Metrics) -> bool:
    """Whether these are the metrics of an evaluation, not of a training step."""
    return all(name.startswith("eval/") for name in metrics)
