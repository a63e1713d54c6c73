"""The trackers that write metrics, warnings, timeline and completions as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlsys.config import TrackingConfig
from rlsys.files import JsonlWriter
from rlsys.rotation import RotatingJsonlWriter
from rlsys.run.folder import RunDir
from rlsys.timeline.spans import Span
from rlsys.tracking.base import HealthWarning, Metrics, Split, Tracker
from rlsys.tracking.completions import completion_rows
from rlsys.types import RolloutGroup

TIMELINE_MAX_MB = 64
"""Mebibytes of timeline.jsonl after which it becomes an older part."""


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
        self._writer = RotatingJsonlWriter(path, TIMELINE_MAX_MB)

    def log_timeline(self, spans: Sequence[Span]) -> None:
        """Append a row for each span."""
        self._writer.append(*(span.row() for span in spans))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WarningsTracker(Tracker):
    """warnings.jsonl: one row when a problem begins or is over. Without any there is no file."""

    def __init__(self, path: Path):
        self._path = path
        self._writer: JsonlWriter | None = None

    def log_health(self, warning: HealthWarning) -> None:
        """Append the warning."""
        if self._writer is None:
            self._writer = JsonlWriter(self._path)
        self._writer.append(warning.row())

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class CompletionsTracker(Tracker):
    """completions.jsonl: one row a completion, written before the update.

    Held-out groups and filtered groups have their own files.

    Args:
        run_dir: the folder.
        config: the section `tracking`; None has its defaults.
    """

    def __init__(self, run_dir: RunDir, config: TrackingConfig | None = None):
        self._run_dir = run_dir
        self._config: TrackingConfig = config or TrackingConfig()
        self._writers: dict[Split, RotatingJsonlWriter] = {"train": self._writer("train")}

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Append the G completions of a group together."""
        if split not in self._writers:
            self._writers[split] = self._writer(split)
        self._writers[split].append(*completion_rows(step, group, advantages))

    def _writer(self, split: Split) -> RotatingJsonlWriter:
        path = self._run_dir.completions_of(split)
        return RotatingJsonlWriter(path, self._config.completions_max_mb)

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
