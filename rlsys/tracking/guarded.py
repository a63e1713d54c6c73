"""A tracker that cannot stop a run: for files of the run and its console, which are called at once.

Rows are in their files when the call returns, so a killed run has them. Trackers of other programs
are called in the background, see rlsys.tracking.background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlsys.config import RunConfig
from rlsys.timeline.spans import Span
from rlsys.tracking.base import HealthWarning, Metrics, Split, Tracker
from rlsys.tracking.outages import Outages
from rlsys.types import Device, RolloutGroup, TrainBatch


class GuardedTracker(Tracker):
    """Calls another tracker; what that raises, as on a full disk, is a note and a count.

    Args:
        name: what it writes, for messages.
        tracker: is called.
    """

    def __init__(self, name: str, tracker: Tracker):
        self.outages = Outages(name)
        self._tracker = tracker

    def begin(self, config: RunConfig, device: Device) -> None:
        """Pass them on."""
        self._call("begin", config, device)

    def log_timeline(self, spans: Sequence[Span]) -> None:
        """Pass them on."""
        self._call("log_timeline", spans)

    def log_tokens(self, step: int, groups: Sequence[RolloutGroup], batch: TrainBatch) -> None:
        """Pass them on."""
        self._call("log_tokens", step, groups, batch)

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Pass it on."""
        self._call("log_metrics", step, metrics)

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Pass it on."""
        self._call("log_completions", step, group, advantages, split)

    def log_warning(self, step: int, text: str) -> None:
        """Pass it on."""
        self._call("log_warning", step, text)

    def log_health(self, warning: HealthWarning) -> None:
        """Pass it on."""
        self._call("log_health", warning)

    def close(self) -> None:
        """Close it, and say what was lost."""
        try:
            self._tracker.close()
        except Exception as error:
            self.outages.failed(error, "It was being closed")
        self.outages.finish()

    def _call(self, method: str, *args: Any) -> None:
        try:
            getattr(self._tracker, method)(*args)
        except Exception as error:
            self.outages.lost[method] += 1
            self.outages.failed(error, "The run goes on; what it should record is lost")
        else:
            self.outages.worked()
