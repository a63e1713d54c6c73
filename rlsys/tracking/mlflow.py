"""MLflow: numbers, the config as parameters, and the completions of each step as a table."""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rlsys.config import RunConfig
from rlsys.config.schema.tracking import TrackersConfig
from rlsys.packages import installed_version
from rlsys.tracking.base import Metrics, numbers_of, register_tracker, run_name
from rlsys.tracking.environment import config_values, environment, flat
from rlsys.tracking.tables import COLUMNS, TableTracker

T = TypeVar("T")

MOST_METRICS, MOST_PARAMETERS, LONGEST_VALUE = 1000, 100, 500
"""What MLflow takes in one request, and characters of a parameter in all its versions."""
_SERVERS = ("http://", "https://", "databricks", "uc:")
"""How addresses begin that mlflow-skinny can write to."""
_runs: dict[str, str] = {}
"""output_dir -> id of this process's run: a connection that broke does not make a second one."""


def storage_problem(tracking: TrackersConfig) -> str | None:
    """Why the installed MLflow cannot write where it should."""
    address = tracking.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if address.startswith(_SERVERS) or installed_version("mlflow") is not None:
        return None
    return (
        f"tracking.report_to names 'mlflow', whose records go to "
        f"{address or 'a database in the working directory'}, and mlflow-skinny writes to servers "
        "only: `pip install mlflow`, or name a server in tracking.mlflow_tracking_uri"
    )


@register_tracker("mlflow")
class MlflowTracker(TableTracker):
    """One run of the experiment `tracking.project`; a run that is resumed is a new one."""

    def __init__(self, config: RunConfig, resumed_from: int | None):
        super().__init__()
        # MLflow would retry for minutes before it says anything; the queue retries, too.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        tracking = importlib.import_module("mlflow.tracking")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = tracking.MlflowClient(tracking_uri=config.tracking.mlflow_tracking_uri)
        run_id = _runs.get(config.output_dir)
        if run_id is None:
            run_id = _runs[config.output_dir] = self._start(config)
        self._run_id = run_id

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Log the numbers, and the completions of the step."""
        now_ms = int(time.time() * 1000)
        numbers = [
            self._entities.Metric(allowed_name(name), value, now_ms, step)
            for name, value in numbers_of(metrics).items()
        ]
        for part in _parts(numbers, MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=part)
        if rows := self.rows_of(step):
            table = json.dumps({"columns": COLUMNS, "data": rows})  # as MLflow shows tables
            self._client.log_text(self._run_id, table, f"completions/step-{step:06}.json")
        self.forget_rows(step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)

    def _start(self, config: RunConfig) -> str:
        """Make a run with its config and environment; returns its id."""
        project = config.tracking.project
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = (
            self._client.create_experiment(project)
            if experiment is None
            else experiment.experiment_id
        )
        facts = environment()
        tags = {f"packages.{name}": version for name, version in facts["packages"].items()}
        if facts["git"]:
            tags["mlflow.source.git.commit"] = facts["git"]["commit"]
        run_id: str = self._client.create_run(
            experiment_id, run_name=run_name(config), tags=tags
        ).info.run_id
        values = config_values(config)
        parameters = [
            self._entities.Param(allowed_name(name), str(value)[:LONGEST_VALUE])
            for name, value in flat(values).items()
        ]
        for part in _parts(parameters, MOST_PARAMETERS):
            self._client.log_batch(run_id, params=part)
        self._client.log_dict(run_id, values, "config.json")
        self._client.log_dict(run_id, facts, "environment.json")
        return run_id


def allowed_name(name: str) -> str:
    """A name with MLflow's characters: pass_at_4 for pass@4, memory_GiB for memory(GiB)."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_")).strip("_")


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
