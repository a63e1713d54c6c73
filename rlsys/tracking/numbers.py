"""A tracker that hands numbers to a function, for what this folder may not import."""

from __future__ import annotations

from collections.abc import Callable

from rlsys.tracking.base import Metrics, Tracker, numbers_of


class NumbersTracker(Tracker):
    """Calls `take(step, numbers)` with the metrics of each step and evaluation."""

    def __init__(self, take: Callable[[int, dict[str, float]], object]):
        self._take = take

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Hand the numbers on."""
        self._take(step, numbers_of(metrics))

    def close(self) -> None:
        """Nothing is pending."""
