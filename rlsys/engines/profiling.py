"""What torch sees in one process for a while: its operations and GPU kernels, and its memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rlsys.types import Device

CLOCK_MARK = "rlsys clock"
"""An event of the trace whose unix time is known."""
MEMORY_EVENTS = 1_000_000
"""Allocations that are kept, the newest."""


@dataclass(frozen=True, slots=True)
class Traced:
    """What one process wrote."""

    label: str
    """The process among those of its actor; empty if there is one."""
    trace: Path | None
    """torch's trace, a Chrome trace (JSON, gzip); None if it was not asked for."""
    marked_at: float
    """Unix seconds of CLOCK_MARK, on the clock of this process's host."""
    memory: Path | None
    """Snapshot of the GPU's memory with its history; None if it was not asked for."""


class TorchTrace:
    """Records from its construction to `stop`, both in the thread that works.

    Args:
        operations: record operations, and kernels on a GPU.
        memory: record what is allocated on this process's GPU.
        device: that it computes on.
    """

    def __init__(self, *, operations: bool, memory: bool, device: Device):
        self._memory, self._marked_at = memory, 0.0
        self._profile: torch.profiler.profile | None = None
        if memory:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        if operations:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
            self._profile = torch.profiler.profile(activities=kinds)
            self._profile.start()
            for name in ("rlsys warm-up", CLOCK_MARK):  # the first one takes milliseconds
                self._marked_at = time.time()
                with torch.profiler.record_function(name):
                    pass

    def stop(self, folder: Path, name: str, label: str = "") -> Traced:
        """Write `name`.trace.json.gz and `name`.memory.pickle, as far as they were asked for."""
        folder.mkdir(parents=True, exist_ok=True)
        trace = memory = None
        if self._profile is not None:
            self._profile.stop()
            trace = folder / f"{name}.trace.json.gz"
            self._profile.export_chrome_trace(str(trace))
        if self._memory:
            memory = folder / f"{name}.memory.pickle"
            torch.cuda.memory._dump_snapshot(str(memory))
            torch.cuda.memory._record_memory_history(enabled=None)
        return Traced(label, trace, self._marked_at, memory)
