"""Rules between the fields of the section `checkpoint`, and what they need of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.schema import RunConfig


def checkpoint_problems(config: RunConfig) -> Iterator[Problem]:
    """Every rule about checkpoints that `config` breaks."""
    checkpoint = config.checkpoint
    if checkpoint.save_hf_total_limit is not None and not checkpoint.save_hf_steps:
        yield Problem(
            "checkpoint.save_hf_total_limit limits the folders of checkpoint.save_hf_steps, which "
            "is null: set save_hf_steps too, or leave the limit out"
        )
    if checkpoint.best_metric is None:
        yield from _without_metric(config)
    else:
        yield from _metric_problems(config, checkpoint.best_metric)
    policy = config.policy
    keeps_snapshots = config.recovery.max_restarts > 0 and policy.snapshot_steps != 0
    if policy.on_nonfinite == "rollback" and not keeps_snapshots and checkpoint.save_steps is None:
        yield Problem(
            "policy.on_nonfinite = rollback goes back to a snapshot or a checkpoint, and the run "
            "keeps neither: set policy.snapshot_steps (with recovery.max_restarts above 0) or "
            "checkpoint.save_steps"
        )
    if checkpoint.save_steps is None and checkpoint.save_retain_interval is not None:
        yield Problem(
            "checkpoint.save_retain_interval keeps checkpoints, and checkpoint.save_steps = null "
            "writes none: set save_steps, or leave save_retain_interval out"
        )


def _without_metric(config: RunConfig) -> Iterator[Problem]:
    checkpoint = config.checkpoint
    asks = {
        "checkpoint.load_best_model_at_end": checkpoint.load_best_model_at_end,
        "checkpoint.greater_is_better": checkpoint.greater_is_better is not None,
        "checkpoint.resume = best": checkpoint.resume == "best",
    }
    for name, is_set in asks.items():
        if is_set:
            yield Problem(
                f"{name} needs checkpoint.metric_for_best_model, which says what the best is: set "
                "it to a metric such as eval/loss or eval/reward"
            )


def _metric_problems(config: RunConfig, metric: str) -> Iterator[Problem]:
    checkpoint, eval_steps = config.checkpoint, config.eval_steps
    given = f"checkpoint.metric_for_best_model = {checkpoint.metric_for_best_model}"
    if checkpoint.save_steps is None:
        yield Problem(
            f"{given} chooses among checkpoints, and checkpoint.save_steps = null writes none: set "
            "save_steps"
        )
    if not metric.startswith("eval/"):
        return
    if eval_steps is None:
        yield Problem(f"{given} is of evaluations, and eval_steps is null: set eval_steps")
    elif isinstance(checkpoint.save_steps, int) and checkpoint.save_steps % eval_steps:
        yield Problem(
            f"{given} needs a value at each checkpoint, and checkpoint.save_steps = "
            f"{checkpoint.save_steps} is not a multiple of eval_steps = {eval_steps}: make it one"
        )
