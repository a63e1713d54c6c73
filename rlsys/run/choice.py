"""Which checkpoint a run continues from: the newest or best whole one, or that of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlsys.config import CheckpointConfig
from rlsys.run.folder import RunDir
from rlsys.run.kept import best_first, checkpoint_steps
from rlsys.run.manifest import checkpoint_problem


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to continue from."""

    step: int | None = None
    """Its step; None if there is nothing to continue from."""
    damaged: Mapping[int, str] = field(default_factory=dict)
    """Step -> what is wrong, of those that would have come first."""
    problem: str | None = None
    """Why there is no such checkpoint, though there are others, and what to do."""


def choose_checkpoint(run: RunDir, config: CheckpointConfig, *, read_all: bool) -> Choice:
    """The checkpoint that `checkpoint.resume` names.

    A damaged one is passed over, unless the user named its step.

    Args:
        run: the folder of the run.
        config: says which one.
        read_all: whether every byte is compared with the manifest; else names and sizes only.
    """
    steps = checkpoint_steps(run.checkpoints)
    if not steps:
        return Choice()
    if isinstance(config.resume, int) and not isinstance(config.resume, bool):
        return _of_step(run, config.resume, steps, read_all=read_all)
    candidates = steps[::-1]
    if config.resume == "best":
        candidates = best_first(run, steps, config)
        if not candidates:
            return Choice(
                problem=f"no checkpoint in {run.checkpoints} has a value of "
                f"checkpoint.metric_for_best_model = {config.metric_for_best_model} in "
                f"{run.metrics.name}: name a metric that was logged at one of the steps "
                f"{_listed(steps)}"
            )
    damaged: dict[int, str] = {}
    for step in candidates:
        problem = checkpoint_problem(run.checkpoints / f"step-{step}", read_all=read_all)
        if problem is None:
            return Choice(step, damaged)
        damaged[step] = problem
    return Choice(
        problem=f"no checkpoint in {run.checkpoints} is whole: "
        + "; ".join(f"step {step}: {text}" for step, text in damaged.items())
        + ". Start from step 0 with --overwrite, or from weights that are whole with --model.path "
        "and another --output_dir"
    )


def _of_step(run: RunDir, step: int, steps: list[int], *, read_all: bool) -> Choice:
    if step not in steps:
        return Choice(
            problem=f"{run.checkpoints} has no checkpoint of step {step}, it has {_listed(steps)}"
        )
    problem = checkpoint_problem(run.checkpoints / f"step-{step}", read_all=read_all)
    if problem is None:
        return Choice(step)
    whole = [
        other
        for other in steps
        if other != step
        and checkpoint_problem(run.checkpoints / f"step-{other}", read_all=False) is None
    ]
    remedy = f"name another step, {_listed(whole)}" if whole else "no other one is whole"
    return Choice(
        problem=f"the checkpoint of step {step} in {run.checkpoints} cannot be "
        f"continued from: {problem}; {remedy}"
    )


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
