"""All trackers of a run as one, with progress and speed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import get_args

from rlsys.config import RunConfig, TrackingConfig
from rlsys.files import JsonlWriter
from rlsys.rotation import truncate_parts_after
from rlsys.run.folder import ENDED, RUNNING, RunDir
from rlsys.timeline.spans import Span
from rlsys.tracking.background import BackgroundTracker
from rlsys.tracking.base import (
    HealthWarning,
    Metrics,
    Split,
    Tracker,
    is_evaluation,
    trackers,
)
from rlsys.tracking.console import console_tracker, log_tracker
from rlsys.tracking.environment import environment, summary
from rlsys.tracking.guarded import GuardedTracker
from rlsys.tracking.jsonl import (
    CompletionsTracker,
    JsonlTracker,
    TimelineTracker,
    WarningsTracker,
)
from rlsys.tracking.packages import missing_packages
from rlsys.tracking.plot import CurveTracker
from rlsys.tracking.summary import SummaryTracker
from rlsys.tracking.tokens import TokensTracker, drop_tokens_after
from rlsys.types import Device, RolloutGroup, TrainBatch


def build_tracker(config: RunConfig, *, resumed_from: int | None = None) -> CompositeTracker:
    """The trackers of a run: console, metrics.jsonl, completions.jsonl and `report_to`.

    Marks the run as running. It does not need Ray, so a wrong name or a missing package is found
    before anything starts. None of them can stop the run: those of `report_to` work in the
    background, and what the others cannot write is a note.

    Args:
        config: of the run.
        resumed_from: the step of the checkpoint that the run continues from. Records of later steps
            are dropped, because these steps are taken again.

    Raises:
        ValueError: a tracker is unknown, or its package is missing.
    """
    names = config.tracking.report_to
    factories = {name: trackers[name] for name in names}
    if missing := missing_packages(names):
        raise ValueError(missing)
    run_dir = RunDir(Path(config.output_dir))
    if resumed_from is not None:
        rows = (run_dir.metrics, run_dir.warnings, run_dir.timeline)
        for path in (*rows, *map(run_dir.completions_of, get_args(Split))):
            truncate_parts_after(path, resumed_from)
        drop_tokens_after(run_dir, resumed_from)
    parts: list[Tracker] = [
        GuardedTracker("metrics.jsonl", JsonlTracker(run_dir.metrics)),
        GuardedTracker("warnings.jsonl", WarningsTracker(run_dir.warnings)),
        GuardedTracker("timeline.jsonl", TimelineTracker(run_dir.timeline)),
    ]
    if (tracking := config.completions_tracking) is not None:
        parts += _completions_trackers(run_dir, tracking)
    _record_environment(run_dir, resumed_from)
    # They are closed in this order, the slow picture last: `ray job stop` kills after 3 seconds.
    parts.append(GuardedTracker("the console", console_tracker(config, resumed_from)))
    log = log_tracker(config, run_dir.logs / "driver-0.log")
    parts.append(GuardedTracker("driver-0.log", log))
    timeout_s = config.tracking.close_timeout_s
    parts += [
        BackgroundTracker(name, partial(make, config, resumed_from), close_timeout_s=timeout_s)
        for name, make in factories.items()
    ]
    parts.append(GuardedTracker("summary.md", SummaryTracker(config, run_dir)))
    parts.append(GuardedTracker("the picture of the run", CurveTracker(run_dir)))
    run_dir.write_status(RUNNING)
    return CompositeTracker(parts, run_dir, Progress(config.num_steps))


def _completions_trackers(run_dir: RunDir, tracking: TrackingConfig) -> Iterator[Tracker]:
    yield GuardedTracker("completions.jsonl", CompletionsTracker(run_dir, tracking))
    if tracking.completion_tokens:
        yield GuardedTracker("tokens", TokensTracker(run_dir))


def _record_environment(run_dir: RunDir, resumed_from: int | None) -> None:
    """Say and append what this process runs with."""
    print(f"environment: {summary()}", flush=True)
    writer = JsonlWriter(run_dir.environment)
    writer.append({"time": time.time(), "resumed_from": resumed_from, **environment()})
    writer.close()


class Progress:
    """Progress and speed of a run, with the names of ms-swift's log line.

    Times and speed are this process's: after a resume, `elapsed_time` starts at 0 and only
    new steps count. Speed is measured from the start of the first of them, so the start of the
    engines counts in `elapsed_time` but not in `train_speed(iter/s)`.
    """

    def __init__(self, max_steps: int, clock: Callable[[], float] = time.monotonic):
        self._max_steps = max_steps
        self._clock = clock
        self._start = clock()
        self._first_step_start: float | None = None
        self._steps = 0

    def metrics(self, step: int, time_of_step: float | None) -> dict[str, float | str]:
        """Metrics of a step that has just ended; it took `time_of_step` seconds, if known."""
        now = self._clock()
        if self._first_step_start is None:
            self._first_step_start = self._start if time_of_step is None else now - time_of_step
        self._steps += 1
        seconds_per_step = max(now - self._first_step_start, 1e-9) / self._steps
        return {
            "global_step/max_steps": f"{step}/{self._max_steps}",
            "percentage": f"{step / self._max_steps:.2%}",
            "elapsed_time": format_seconds(now - self._start),
            "remaining_time": format_seconds((self._max_steps - step) * seconds_per_step),
            "train_speed(iter/s)": round(1 / seconds_per_step, 6),
        }


class CompositeTracker(Tracker):
    """Passes every call on to all trackers; threads may call it at the same time."""

    def __init__(self, parts: list[Tracker], run_dir: RunDir, progress: Progress):
        self._parts = parts
        self._background = [part for part in parts if isinstance(part, BackgroundTracker)]
        self._run_dir = run_dir
        self._progress = progress
        self._lock = threading.RLock()
        self._closed = False

    def add(self, name: str, tracker: Tracker) -> None:
        """Add a tracker that could not be made before, such as one that needs the cluster."""
        with self._lock:
            self._parts.append(GuardedTracker(name, tracker))

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Pass metrics on, a training step's with progress and speed."""
        with self._lock:
            if not is_evaluation(metrics):
                time_of_step = metrics.get("time/step")
                assert not isinstance(time_of_step, str)
                metrics = {**metrics, **self._progress.metrics(step, time_of_step)}
                metrics |= self._losses()
            for part in self._parts:
                part.log_metrics(step, metrics)

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Pass the group on."""
        with self._lock:
            for part in self._parts:
                part.log_completions(step, group, advantages, split)

    def begin(self, config: RunConfig, device: Device) -> None:
        """Pass them on."""
        with self._lock:
            for part in self._parts:
                part.begin(config, device)

    def log_tokens(self, step: int, groups: Sequence[RolloutGroup], batch: TrainBatch) -> None:
        """Pass the tokens on."""
        with self._lock:
            for part in self._parts:
                part.log_tokens(step, groups, batch)

    def log_timeline(self, spans: Sequence[Span]) -> None:
        """Pass the spans on."""
        with self._lock:
            for part in self._parts:
                part.log_timeline(spans)

    def log_warning(self, step: int, text: str) -> None:
        """Pass the warning on."""
        with self._lock:
            for part in self._parts:
                part.log_warning(step, text)

    def log_health(self, warning: HealthWarning) -> None:
        """Pass the warning on."""
        with self._lock:
            for part in self._parts:
                part.log_health(warning)

    def close(self) -> None:
        """Close every tracker, even if one of them raises; a second call does nothing."""
        with self._lock, ExitStack() as stack:
            if self._closed:
                return
            self._closed = True
            for waiting in self._background:
                waiting.begin_close()  # all at once
            for part in reversed(self._parts):
                stack.callback(part.close)
            stack.callback(self._run_dir.write_status, ENDED)  # first: it must not be lost

    def _losses(self) -> dict[str, float]:
        """Records that trackers have lost so far; nothing of those that lost none."""
        return {
            f"tracking/{part.name}/lost": float(part.outages.lost.total())
            for part in self._background
            if part.outages.lost
        }


def format_seconds(seconds: float) -> str:
    """Seconds as ms-swift writes them: "3m 12s", "1h 0m 5s", "2d 0h 0m 1s"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    parts = [(days, "d"), (hour, "h"), (minute, "m"), (second, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{number}{unit}" for number, unit in parts)
