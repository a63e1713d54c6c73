"""One run, read from the files in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rlsys.config import CheckpointConfig
from rlsys.config.yaml_text import read_yaml
from rlsys.records.completions import Completions, read_id
from rlsys.records.metrics import Metrics, MetricTable
from rlsys.records.rows import Rows
from rlsys.records.timeline import SpanTable, Timeline
from rlsys.records.tokens import CompletionTokens, read_tokens
from rlsys.run.folder import RunDir, State
from rlsys.tracking.base import Split

HELD_OUT = ("eval/reward", "eval/loss")
"""Metrics by which a run without `checkpoint.metric_for_best_model` is the best."""


@dataclass(frozen=True, slots=True)
class BestEval:
    """The best evaluation of a run."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What is known about a run at a glance."""

    method: Literal["grpo", "sft", "preference", "distill"] | None
    """None where config.yaml is missing or damaged."""
    state: State | None
    """None for a folder without a status, such as a part of a copied run."""
    step: int
    """The last step whose metrics are there; 0 before the first."""
    steps: int | None
    """All steps of the run; None before the first step."""
    started: float | None
    """Unix seconds at which config.yaml was written."""
    updated: float | None
    """Unix seconds of the last metrics or completions."""
    seconds: float
    """The sum of time/step: what the steps took, over all processes that continued the run."""
    best_eval: BestEval | None
    exit_code: int | None
    """How the run ended; None while it goes on or after it was killed."""
    reason: str | None
    """Why it ended, in words."""


class RunRecord:
    """Reads one run; every method looks at the files again, and reads only what is new in them.

    Several threads may use it. Files that are missing, of older versions or torn give what they
    have.

    Args:
        path: output_dir of the run.
    """

    def __init__(self, path: Path):
        self.path = path
        self.run = RunDir(path)
        self._metrics = Metrics(self.run.metrics)
        self._completions = {split: Completions(self.run, split) for split in get_args(Split)}
        self._warnings = Rows(self.run.warnings)
        self._timeline = Timeline(self.run.timeline)

    @property
    def name(self) -> str:
        """`tracking.run_name`, or the name of the folder."""
        tracking = self.config.get("tracking")
        name = tracking.get("run_name") if isinstance(tracking, dict) else None
        return name if isinstance(name, str) else self.path.resolve().name

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml as nested mappings; empty where it is missing or damaged."""
        try:
            config = read_yaml(self.run.config)
        except (OSError, ValueError):
            return {}
        return config if isinstance(config, dict) else {}

    @property
    def status(self) -> RunStatus:
        """What the run is doing, and how far it is."""
        config, table = self.config, self._metrics.table(["time/step"])
        end = self.run.read_end()
        times = table.columns["time/step"]
        total = self._metrics.texts().get("global_step/max_steps", "").rpartition("/")[2]
        return RunStatus(
            method=_method(config) if config else None,
            state=self.run.state(),
            step=int(table.steps[-1]) if len(table.steps) else 0,
            steps=int(total) if total.isdecimal() else None,
            started=_modified(self.run.config),
            updated=max(
                filter(None, map(_modified, (self.run.metrics, self.run.completions))), default=None
            ),
            seconds=float(np.nansum(times)),
            best_eval=self._best_eval(config),
            exit_code=end and end[0],
            reason=end and end[1],
        )

    def metric_names(self) -> list[str]:
        """The metrics that are numbers, in alphabetical order."""
        return self._metrics.names()

    def metrics(self, names: list[str] | None = None, after_step: int | None = None) -> MetricTable:
        """Metrics of the steps after `after_step`, as `Metrics.table` explains."""
        return self._metrics.table(names, after_step)

    def completions(self, split: Split = "train") -> Completions:
        """The completions of one kind; its `query` filters and sorts them."""
        return self._completions[split]

    def tokens(self, completion_id: str) -> CompletionTokens | None:
        """The tokens of a training completion; None if they were not recorded.

        Raises:
            ValueError: `completion_id` is not an id.
        """
        return read_tokens(self.run, self.config, *read_id(completion_id))

    def warnings(self) -> list[dict[str, Any]]:
        """The rows of warnings.jsonl, oldest first."""
        return self._warnings.read()

    def spans(self) -> SpanTable:
        """The spans of timeline.jsonl as columns."""
        return self._timeline.table()

    def timeline(self, start: float = -math.inf, end: float = math.inf) -> list[dict[str, Any]]:
        """The spans of timeline.jsonl that overlap a time in Unix seconds, in recorded order."""
        return list(self.spans().overlapping(start, end).rows())

    def actors(self) -> list[dict[str, Any]]:
        """The rows of actors.json; empty where it is missing or damaged."""
        try:
            rows = json.loads(self.run.actors.read_bytes())
        except (OSError, ValueError):
            return []
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def _best_eval(self, config: dict[str, Any]) -> BestEval | None:
        section = config.get("checkpoint")
        fields = section if isinstance(section, dict) else {}
        known = CheckpointConfig.model_construct(
            metric_for_best_model=fields.get("metric_for_best_model"),
            greater_is_better=fields.get("greater_is_better"),
        )
        names = set(self._metrics.names())
        own = known.best_metric
        candidates = (own, *HELD_OUT) if own and own.startswith("eval/") else HELD_OUT
        metric = next((name for name in candidates if name in names), None)
        if metric is None:
            return None
        chosen = known if metric == own else CheckpointConfig(metric_for_best_model=metric)
        table = self._metrics.table([metric])
        values = table.columns[metric]
        best = [(float(v), int(s)) for v, s in zip(values, table.steps, strict=True) if v == v]
        sign = -1 if chosen.best_is_greatest else 1
        if not best:
            return None
        value, step = min(best, key=lambda pair: (sign * pair[0], pair[1]))
        return BestEval(metric, value, step)


def open_run(path: Path | str) -> RunRecord:
    """The record of the run in a folder.

    Raises:
        ValueError: the folder does not exist or does not hold a run.
    """
    path = Path(path)
    if holds_records(path):
        return RunRecord(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    runs = find_runs(path)
    hint = f" It holds runs: {', '.join(run.name for run in runs[:5])}." if runs else ""
    raise ValueError(
        f"{path} is not the output directory of a run: it has no config.yaml, status or "
        f"metrics.jsonl.{hint}"
    )


def find_runs(parent: Path) -> list[Path]:
    """The folders in `parent` that hold runs, by name; those that a run replaced are left out."""
    try:
        inside = sorted(item for item in parent.iterdir() if item.is_dir())
    except OSError:
        return []
    return [item for item in inside if holds_records(item)]


def holds_records(path: Path) -> bool:
    """Whether a run has written into this folder."""
    run = RunDir(path)
    return any(file.is_file() for file in (run.metrics, run.status)) or (
        run.config.is_file() and (run.completions.exists() or run.eval_completions.exists())
    )


def _method(config: Mapping[str, Any]) -> Literal["grpo", "sft", "preference", "distill"]:
    """The command that trained it, by the section that it alone has."""
    if "preference" in config:
        return "preference"
    if "distill" in config:
        return "distill"
    return "sft" if "sft" in config else "grpo"


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
