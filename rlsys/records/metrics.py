"""The metrics of a run as columns."""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlsys.files import decode_row
from rlsys.rotation import GrowingFile


@dataclass(frozen=True, slots=True)
class MetricTable:
    """Metrics of R steps, in the order of steps."""

    steps: NDArray[np.int64]
    """[R]; an evaluation before the first step has step 0."""
    columns: dict[str, NDArray[np.float64]]
    """Metric name -> [R]; NaN where a step has no such metric, or logged NaN or infinity."""


class Metrics:
    """Follows metrics.jsonl: each row is decoded once, in whichever thread asks first."""

    def __init__(self, path: Path):
        self._file = GrowingFile(path)
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._steps = array("q")
        self._rows: dict[int, int] = {}
        """Step -> its row. A step and the evaluation after it are two lines and one row."""
        self._columns: dict[str, array[float]] = {}
        self._texts: dict[str, str] = {}

    def names(self) -> list[str]:
        """The metrics that are numbers, in alphabetical order."""
        with self._lock:
            self._update()
            return sorted(self._columns)

    def texts(self) -> dict[str, str]:
        """The newest value of each metric that is a text, such as `remaining_time`."""
        with self._lock:
            self._update()
            return dict(self._texts)

    def table(
        self, names: Sequence[str] | None = None, after_step: int | None = None
    ) -> MetricTable:
        """Some metrics of the steps after one.

        Args:
            names: the metrics; None is all. One that the run does not have is a column of NaN.
            after_step: None is all steps. A step that was read once may get more columns later,
                by the evaluation that follows it.
        """
        with self._lock:
            self._update()
            steps = np.array(self._steps, dtype=np.int64)
            order = np.argsort(steps, kind="stable")
            if after_step is not None:
                order = order[np.searchsorted(steps[order], after_step, side="right") :]
            columns = {}
            for name in sorted(self._columns) if names is None else names:
                values = np.full(len(steps), math.nan)
                if (known := self._columns.get(name)) is not None:
                    values[: len(known)] = known
                columns[name] = values[order]
            return MetricTable(steps[order], columns)

    def _update(self) -> None:
        restarted, lines = self._file.new_lines()
        if restarted:
            self._forget()
        for line in lines:
            row = decode_row(line)
            if row is not None and type(step := row.pop("step", None)) is int:
                self._add(step, row)

    def _add(self, step: int, row: dict[str, object]) -> None:
        place = self._rows.get(step)
        if place is None:
            place = self._rows[step] = len(self._steps)
            self._steps.append(step)
        columns = self._columns
        for name, value in row.items():
            if isinstance(value, str):
                self._texts[name] = value
                continue
            if value is None:
                value = math.nan
            elif not isinstance(value, int | float):
                continue
            column = columns.get(name)
            if column is None:
                column = columns[name] = array("d")
            missing = place - len(column)
            if missing < 0:
                column[place] = value
                continue
            if missing > 0:
                column.extend([math.nan] * missing)
            column.append(value)
