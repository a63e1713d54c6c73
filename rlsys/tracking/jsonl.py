"""The trackers that write metrics.jsonl, timeline.jsonl and completions.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlsys.files import JsonlWriter
from rlsys.run.folder import RunDir
from rlsys.timeline.spans import Span
from rlsys.tracking.base import Metrics, Split, Tracker
from rlsys.tracking.completions import completion_rows
from rlsys.types import RolloutGroup


class JsonlTracker(Tracker):
    """metrics.jsonl: one row a step."""

    def __init__(self, path: Path):
        self._writer = JsonlWriter(path)

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Append `{"step": step, ...}`."""
        self._writer.append({"step": step, **metrics})

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class TimelineTracker(Tracker):
    """timeline.jsonl: one row a span."""

    def __init__(self, path: Path):
        self._writer = JsonlWriter(path)

    def log_timeline(self, spans: Sequence[Span]) -> None:
        """Append a row for each span."""
        self._writer.append(*(span.row() for span in spans))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class CompletionsTracker(Tracker):
    """completions.jsonl: one row a completion, written before the update.

    Held-out groups and filtered groups have their own files.
    """

    def __init__(self, run_dir: RunDir):
        self._run_dir = run_dir
        self._writers: dict[Split, JsonlWriter] = {"train": JsonlWriter(run_dir.completions)}

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Append the G completions of a group together."""
        if split not in self._writers:
            self._writers[split] = JsonlWriter(self._run_dir.completions_of(split))
        self._writers[split].append(*completion_rows(step, group, advantages))

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
