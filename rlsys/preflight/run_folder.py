"""Whether a run may write into its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlsys.config import Config
from rlsys.preflight.job_copy import paths_read
from rlsys.problems import Problem
from rlsys.run.checkpoints import checkpoint_steps
from rlsys.run.folder import RunDir
from rlsys.run.resume import holds_run


def output_dir_problems(config: Config) -> Iterator[Problem]:
    """Whether the run's folder can be written to without harm to another run's results."""
    run = RunDir(Path(config.output_dir))
    obstacle = run.obstacle()
    if obstacle is not None:
        yield Problem(
            f"output_dir: {run.path} {obstacle}: choose another one with --output_dir",
            only_here=True,
        )
        return
    steps = checkpoint_steps(run.checkpoints)
    if config.checkpoint.resume and steps:
        # A run that was killed right before its end has its last checkpoint, but no model.
        if config.max_steps is not None and (
            steps[-1] > config.max_steps or (steps[-1] == config.max_steps and run.final.exists())
        ):
            yield Problem(
                f"checkpoint.resume: {run.checkpoints} has step {steps[-1]}, after which max_steps "
                f"= {config.max_steps} leaves nothing to do: raise --max_steps, start over with "
                "--overwrite alone, or choose another folder with --output_dir",
                only_here=True,
            )
    elif config.overwrite:
        needed = [path for path in paths_read(config) if run.holds(Path(path))]
        if needed:
            yield Problem(
                f"overwrite: moves aside {', '.join(needed)}, which this run reads: choose another "
                "folder with --output_dir",
                only_here=True,
            )
    elif config.checkpoint.resume:
        remedy = "add --overwrite to start from step 0"
        if not holds_run(run):
            remedy = f"leave checkpoint.resume out, or {remedy}"
        yield Problem(
            f"checkpoint.resume: {run.checkpoints} holds no checkpoint to continue from; {remedy}",
            only_here=True,
        )
    elif holds_run(run):
        found, remedy = "without a checkpoint", ""
        if steps:
            found, remedy = f"up to step {steps[-1]}", "continue it with --checkpoint.resume, "
        yield Problem(
            f"output_dir: {run.path} holds another run, {found}: {remedy}start from step 0 with "
            "--overwrite, which moves its files aside, or choose another folder with --output_dir",
            only_here=True,
        )
