"""Which checkpoints of a run there are, which are kept, and which is the best."""

from __future__ import annotations

import math
from pathlib import Path

from rlsys.config import CheckpointConfig
from rlsys.files import read_jsonl
from rlsys.run.folder import RunDir
from rlsys.run.manifest import checkpoint_problem


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, oldest first."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def kept_steps(run: RunDir, config: CheckpointConfig, limit: int) -> set[int]:
    """The steps whose checkpoints are kept.

    They are the newest `limit` that are whole, the best of these and of the older ones, and those
    of `save_retain_interval`. So the last one that is whole is never dropped, and one that was
    damaged after it was written takes nobody's place.
    """
    steps = checkpoint_steps(run.checkpoints)
    whole = [
        step
        for step in steps
        if checkpoint_problem(run.checkpoints / f"step-{step}", read_all=False) is None
    ]
    retained = config.save_retain_interval
    return {
        *whole[-limit:],
        *best_first(run, whole, config)[:1],
        *(step for step in steps if retained is not None and step % retained == 0),
        *(step for step in steps if not whole or step > whole[-1]),
    }


def best_first(run: RunDir, steps: list[int], config: CheckpointConfig) -> list[int]:
    """The steps that have a value of `metric_for_best_model`, the best first; of equals, the
    earlier."""
    if config.best_metric is None:
        return []
    values = metric_by_step(run.metrics, config.best_metric)
    sign = -1 if config.best_is_greatest else 1
    return sorted(
        (step for step in steps if step in values), key=lambda step: (sign * values[step], step)
    )


def metric_by_step(metrics: Path, name: str) -> dict[int, float]:
    """Step -> value, of a metric in metrics.jsonl; where one was logged twice, the later."""
    if not metrics.is_file():
        return {}
    return {
        row["step"]: float(row[name])
        for row in read_jsonl(metrics)
        if isinstance(row.get("step"), int)
        and isinstance(row.get(name), int | float)
        and math.isfinite(row[name])
    }
