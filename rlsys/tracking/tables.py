"""Completions as rows of tables that trackers show."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rlsys.tracking.base import Split, Tracker
from rlsys.tracking.completions import completion_rows
from rlsys.types import RolloutGroup

COLUMNS = ["step", "group_id", "index", "prompt", "text", "reward", "advantage", "num_tokens"]


class TableTracker(Tracker):
    """A tracker that logs the training completions of a step as a table, with its metrics."""

    def __init__(self) -> None:
        self._rows: dict[int, list[list[Any]]] = defaultdict(list)

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Keep training completions until their step is logged."""
        if split == "train":
            for row in completion_rows(step, group, advantages):
                self._rows[step].append([row[column] for column in COLUMNS])

    def rows_of(self, step: int) -> list[list[Any]]:
        """The completions of a step, each in the order of COLUMNS."""
        return self._rows.get(step, [])

    def forget_rows(self, step: int) -> None:
        """Drop the completions of a step that was logged."""
        self._rows.pop(step, None)
