"""Seconds that work takes where it is done."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Starts when created. On a GPU the current stream reads it, and the host does not wait."""

    def __init__(self, device: torch.device):
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._times = [0.0, 0.0]
        self._read(0)

    def stop(self) -> None:
        """Once, before `seconds`."""
        self._read(1)

    def seconds(self) -> float:
        """From start to stop; waits for a GPU to be there."""
        if self._events:
            start, end = self._events
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        return self._times[1] - self._times[0]

    def _read(self, which: int) -> None:
        if self._events:
            self._events[which].record()
        else:
            self._times[which] = time.perf_counter()
