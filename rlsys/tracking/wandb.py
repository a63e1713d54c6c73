"""Weights & Biases: numbers, and completions as a table that grows with the steps."""

from __future__ import annotations

import importlib
import os
import uuid
from functools import cache
from pathlib import Path
from typing import Any

from rlsys.config import RunConfig
from rlsys.config.schema.tracking import TrackersConfig
from rlsys.redact import names_of_secrets
from rlsys.tracking.base import Metrics, numbers_of, register_tracker, run_name
from rlsys.tracking.environment import config_values, environment
from rlsys.tracking.tables import COLUMNS, TableTracker


def key_problem(tracking: TrackersConfig) -> str | None:
    """Why wandb could not log in: it would ask for the key in the middle of the run."""
    mode = tracking.wandb_mode or os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return None
    wandb = importlib.import_module("wandb")
    try:
        has_key = wandb.login(prompt=False)
    except TypeError:  # older versions cannot be asked so
        has_key = wandb.api.api_key is not None
    if has_key:
        return None
    return (
        "tracking.report_to names 'wandb', which has no API key: run `wandb login`, set "
        "WANDB_API_KEY, or set tracking.wandb_mode to offline"
    )


@register_tracker("wandb")
class WandbTracker(TableTracker):
    """Logs numbers, and adds the completions of each training step to a table.

    A run that is resumed is a new run in wandb with the same name, since wandb refuses to log a
    step again.
    """

    def __init__(self, config: RunConfig, resumed_from: int | None):
        super().__init__()
        self._wandb = importlib.import_module("wandb")
        tracking = config.tracking
        has_secrets = any(names_of_secrets(config.model_dump()))
        self._run = self._wandb.init(
            project=tracking.wandb_project or tracking.project,
            entity=tracking.wandb_entity,
            name=run_name(config),
            id=_run_id(config.output_dir),
            resume="allow",  # of a connection that broke
            mode=tracking.wandb_mode,
            dir=str(Path(config.output_dir)),
            config=config_values(config) | {"environment": environment()},
            # wandb would send the command line, which may hold the secrets of the config.
            settings=self._wandb.Settings(x_disable_meta=has_secrets),
        )
        self._table: Any = None

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Log the numbers, and the completions of the step with them."""
        logged: dict[str, Any] = numbers_of(metrics)
        if rows := self.rows_of(step):
            if self._table is None:
                self._table = self._wandb.Table(columns=COLUMNS, log_mode="INCREMENTAL")
            for row in rows:
                self._table.add_data(*row)
            logged["completions"] = self._table
        self.forget_rows(step)
        self._run.log(logged, step=step)

    def log_warning(self, step: int, text: str) -> None:
        """Raise an alert, which wandb sends to whoever asked for them."""
        self._run.alert(title=f"rlsys, step {step}", text=text)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


@cache
def _run_id(output_dir: str) -> str:
    """The id of this process's run, also when the tracker is made again."""
    return uuid.uuid4().hex[:8]
