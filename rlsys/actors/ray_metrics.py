"""Numbers of a run as gauges of Ray, which Prometheus scrapes on every node of a cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


class RayMetrics:
    """One gauge for each metric, with the name of the run as its tag.

    Args:
        run: the name of the run in trackers.
    """

    def __init__(self, run: str):
        self._tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}

    def set(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges to the values after a step."""
        for name, value in {"step": step, **metrics}.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(gauge_name(name), name, tag_keys=tuple(self._tags))
            self._gauges[name].set(value, tags=self._tags)


def gauge_name(metric: str) -> str:
    """A metric's name in Ray: rlsys_memory_gib of memory(GiB). Prometheus has `ray_` before it.

    Ray would write other letters small itself, with further underscores.
    """
    return "rlsys_" + re.sub(r"\W+", "_", metric).strip("_").lower()
