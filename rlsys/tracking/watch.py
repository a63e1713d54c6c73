"""What a watch is: it looks at the metrics of a step and warns of each problem once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from rlsys.tracking.base import Metrics


class Watch(ABC):
    """Reads the metrics of the steps of this process; after a resume it starts from nothing."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def observe(self, step: int, metrics: Metrics) -> list[str]:
        """Take the metrics of a step or an evaluation; returns the warnings that are new."""
        found = dict(self._find(step, metrics))
        new = [text for topic, text in found.items() if topic not in self._warned]
        self._warned |= found.keys()
        return new

    @abstractmethod
    def _find(self, step: int, metrics: Metrics) -> Iterator[tuple[str, str]]:
        """(topic, warning) for each problem; only the first warning of a topic is given."""
