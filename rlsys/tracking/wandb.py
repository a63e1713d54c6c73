"""Weights & Biases: numbers, and the completions of a step as a table."""

from __future__ import annotations

import importlib
import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

from rlsys.config import RunConfig
from rlsys.redact import without_secrets
from rlsys.tracking.base import Metrics, Split, Tracker, register_tracker
from rlsys.tracking.completions import completion_rows
from rlsys.types import RolloutGroup

TABLE_COLUMNS = ["step", "group_id", "index", "prompt", "text", "reward", "advantage", "num_tokens"]


def find_wandb() -> None:
    """Raise ValueError if the package is not installed."""
    spec = importlib.util.find_spec("wandb")
    # A folder wandb/ with old logs is found too, but has no origin.
    if spec is None or spec.origin is None:
        raise ValueError(
            "tracking.report_to names 'wandb', but the package wandb is not installed. Install it "
            "with `pip install wandb`, or take 'wandb' out of tracking.report_to."
        )


@register_tracker("wandb")
class WandbTracker(Tracker):
    """Logs numbers, and the completions of each training step as a table.

    A resumed run is a new run in wandb with the same name.
    """

    def __init__(self, config: RunConfig, resumed_from: int | None):
        find_wandb()
        self._wandb = importlib.import_module("wandb")
        output_dir = Path(config.output_dir)
        self._run = self._wandb.init(
            project=config.tracking.wandb_project,
            name=config.tracking.run_name or output_dir.resolve().name,
            dir=str(output_dir),
            config=without_secrets(config.model_dump(mode="json")),
        )
        self._rows_of_step: dict[int, list[list[Any]]] = defaultdict(list)

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Log the numbers, and the completions of the step with them."""
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        if rows := self._rows_of_step.pop(step, None):
            numbers["completions"] = self._wandb.Table(columns=TABLE_COLUMNS, data=rows)
        self._run.log(numbers, step=step)

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
                self._rows_of_step[step].append([row[column] for column in TABLE_COLUMNS])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
