"""SwanLab: numbers, and a group of completions every ten steps."""

from __future__ import annotations

import importlib
import os
import uuid
from functools import cache
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.config.schema.tracking import TrackersConfig
from rlsys.run.folder import RunDir
from rlsys.tracking.base import Metrics, Split, Tracker, numbers_of, register_tracker, run_name
from rlsys.tracking.completions import completion_rows, is_shown_as_text
from rlsys.tracking.environment import config_values, environment
from rlsys.types import RolloutGroup


def key_problem(tracking: TrackersConfig) -> str | None:
    """Why SwanLab could not log in: it would ask for the key in the middle of the run."""
    mode = tracking.swanlab_mode or os.environ.get("SWANLAB_MODE", "online")
    if mode not in ("online", "cloud"):
        return None
    if importlib.import_module("swanlab").Settings().api_key:
        return None
    return (
        "tracking.report_to names 'swanlab', which has no API key: run `swanlab login`, set "
        "SWANLAB_API_KEY, or set tracking.swanlab_mode to offline"
    )


@register_tracker("swanlab")
class SwanLabTracker(Tracker):
    """Files are in OUTPUT_DIR/swanlog. A run that is resumed is a new run with the same name."""

    def __init__(self, config: RunConfig, resumed_from: int | None):
        self._swanlab = importlib.import_module("swanlab")
        tracking = config.tracking
        mode = tracking.swanlab_mode
        self._run = self._swanlab.init(
            project=tracking.project,
            workspace=tracking.swanlab_workspace,
            name=run_name(config),
            mode=mode,
            log_dir=str(RunDir(Path(config.output_dir)).swanlab),
            config=config_values(config) | {"environment": environment()},
            reinit=True,
            **({"id": _run_id(config.output_dir), "resume": "allow"} if mode == "online" else {}),
        )

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Log the numbers."""
        self._run.log(numbers_of(metrics), step=step)

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Log the first group of every tenth step as texts."""
        if is_shown_as_text(step, group):
            rows = completion_rows(step, group, advantages)
            texts = [
                self._swanlab.Text(f"{row['prompt']}\n\n{row['text']}", f"reward {row['reward']}")
                for row in rows
            ]
            self._run.log({f"completions/{split}": texts}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


@cache
def _run_id(output_dir: str) -> str:
    """The id of this process's run, also when the tracker is made again."""
    return uuid.uuid4().hex[:16]
