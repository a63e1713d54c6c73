"""The spans of a run's actors as columns: a long run has millions of them."""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.files import decode_row
from rlsys.rotation import GrowingFile


@dataclass(frozen=True, slots=True)
class SpanTable:
    """R spans, in the order in which they were recorded: step by step."""

    actors: list[str]
    """Names."""
    roles: list[str]
    """Of each of `actors`."""
    phases: list[str]
    actor: NDArray[np.int32]
    """[R], an index of `actors`."""
    phase: NDArray[np.int32]
    """[R], an index of `phases`."""
    start: NDArray[np.float64]
    """[R], unix seconds."""
    end: NDArray[np.float64]
    """[R], unix seconds."""
    busy: NDArray[np.float64]
    """[R], seconds of work, where short gaps are inside."""
    step: NDArray[np.int64]
    """[R]."""

    def __len__(self) -> int:
        return len(self.start)

    def chosen(self, rows: NDArray[Any] | slice) -> SpanTable:
        """Some of the spans."""
        return replace(
            self,
            actor=self.actor[rows],
            phase=self.phase[rows],
            start=self.start[rows],
            end=self.end[rows],
            busy=self.busy[rows],
            step=self.step[rows],
        )

    def overlapping(self, start: float, end: float) -> SpanTable:
        """The spans of which a part lies between two times."""
        return self.chosen((self.end >= start) & (self.start <= end))

    def of_steps(self, first: int, last: int) -> SpanTable:
        """The spans of some steps, both included."""
        return self.chosen((self.step >= first) & (self.step <= last))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The spans as timeline.jsonl has them."""
        columns = (self.actor, self.phase, self.start, self.end, self.busy, self.step)
        for actor, phase, start, end, busy, step in zip(
            *(c.tolist() for c in columns), strict=True
        ):
            row = {
                "actor": self.actors[actor],
                "role": self.roles[actor],
                "phase": self.phases[phase],
                "start": start,
                "end": end,
                "step": step,
            }
            if busy != end - start:
                row["busy"] = busy
            yield row


class Timeline:
    """Follows timeline.jsonl: each line is decoded once, in whichever thread asks first."""

    def __init__(self, path: Path):
        self._file = GrowingFile(path)
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._actors: dict[tuple[str, str], int] = {}
        """Name and role -> index."""
        self._phases: dict[str, int] = {}
        self._actor, self._phase, self._step = array("i"), array("i"), array("q")
        self._start, self._end, self._busy = array("d"), array("d"), array("d")

    def table(self) -> SpanTable:
        """All spans so far; lines that hold something else are left out."""
        with self._lock:
            restarted, lines = self._file.new_lines()
            if restarted:
                self._forget()
            for line in lines:
                row = decode_row(line)
                if row is not None:
                    self._add(row)
            return SpanTable(
                actors=[name for name, _ in self._actors],
                roles=[role for _, role in self._actors],
                phases=list(self._phases),
                actor=np.array(self._actor, dtype=np.int32),
                phase=np.array(self._phase, dtype=np.int32),
                start=np.array(self._start, dtype=np.float64),
                end=np.array(self._end, dtype=np.float64),
                busy=np.array(self._busy, dtype=np.float64),
                step=np.array(self._step, dtype=np.int64),
            )

    def _add(self, row: dict[str, Any]) -> None:
        try:
            start, end = float(row["start"]), float(row["end"])
            busy = float(row.get("busy", end - start))
            step, texts = int(row["step"]), (str(row["actor"]), str(row["role"]))
            phase = str(row["phase"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return
        if not (math.isfinite(start) and math.isfinite(busy) and start <= end < math.inf):
            return
        if abs(step) >= 2**53:
            return
        self._actor.append(self._actors.setdefault(texts, len(self._actors)))
        self._phase.append(self._phases.setdefault(phase, len(self._phases)))
        self._start.append(start)
        self._end.append(end)
        self._busy.append(busy)
        self._step.append(step)
