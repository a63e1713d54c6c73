"""Seconds of a training step by phase: the `time/<phase>` metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def _ignore(phase: str, start: float, end: float) -> None:
    pass


class PhaseTimer:
    """Wall-clock seconds of named phases, from its construction on.

    A phase entered again adds to its sum. A phase inside another counts for both. An exception
    inside a phase still records it and passes on.

    Args:
        clock: in seconds.
        on_phase: called with the name, start and end of each phase that has ended.

    Example:
        timer = PhaseTimer()
        with timer("policy_update"):
            policy.update(batch)
        timer.metrics()  # {"time/policy_update": 1.9, "time/step": 2.4}
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str, float, float], None] = _ignore,
    ):
        self._clock = clock
        self._on_phase = on_phase
        self._start = clock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of the `with` body to `phase`."""
        start = self._clock()
        try:
            yield
        finally:
            end = self._clock()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + end - start
            self._on_phase(phase, start, end)

    def metrics(self) -> dict[str, float]:
        """Seconds: `time/<phase>` of each phase, and `time/step` since the construction."""
        phases = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        return phases | {"time/step": self._clock() - self._start}
