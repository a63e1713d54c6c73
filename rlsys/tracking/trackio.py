"""Trackio: numbers, and the completions of each step as a table; local, or a Space of a hub."""

from __future__ import annotations

import importlib
from typing import Any

from rlsys.config import RunConfig
from rlsys.tracking.base import Metrics, numbers_of, register_tracker, run_name
from rlsys.tracking.environment import config_values, environment
from rlsys.tracking.tables import COLUMNS, TableTracker

_made: set[str] = set()
"""output_dirs of this process: what is made again goes on with its run."""


@register_tracker("trackio")
class TrackioTracker(TableTracker):
    """Logs to `trackio show`'s folder (TRACKIO_DIR), or to `tracking.trackio_space_id`.

    A run that is resumed is a new run with the same name.
    """

    def __init__(self, config: RunConfig, resumed_from: int | None):
        super().__init__()
        self._trackio = importlib.import_module("trackio")
        self._run = self._trackio.init(
            project=config.tracking.project,
            name=run_name(config),
            space_id=config.tracking.trackio_space_id,
            config=config_values(config) | {"environment": environment()},
            resume="allow" if config.output_dir in _made else "never",
            embed=False,
        )
        _made.add(config.output_dir)

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Log the numbers, and the completions of the step with them."""
        logged: dict[str, Any] = numbers_of(metrics)
        if rows := self.rows_of(step):
            logged["completions"] = self._trackio.Table(columns=COLUMNS, data=rows)
        self.forget_rows(step)
        self._run.log(logged, step=step)

    def log_warning(self, step: int, text: str) -> None:
        """Show it among the alerts of the run."""
        self._run.alert(title="rlsys", text=text, step=step)

    def close(self) -> None:
        """Send what is pending."""
        self._run.finish()
