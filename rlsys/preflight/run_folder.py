"""How a run starts in its folder: it continues, moves an earlier run aside, or may not start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.model.folder import find_model_folder
from rlsys.model.shape import read_model_shape
from rlsys.model.weight_files import DATA_FILE, ROLLOUTS_FILE
from rlsys.preflight.job_copy import paths_read
from rlsys.problems import Problem
from rlsys.run.choice import choose_checkpoint
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps
from rlsys.run.resume import holds_run, refused_change


@dataclass(frozen=True, slots=True)
class StartPlan:
    """How a run starts in its folder."""

    resume_step: int | None = None
    """The step of the checkpoint that it continues from; None starts from step 0."""
    moves_aside: bool = False
    """Whether files of an earlier run are moved aside."""
    damaged: Mapping[int, str] = field(default_factory=dict)
    """Step -> what is wrong, of checkpoints that were passed over."""
    problem: str | None = None
    """Why it cannot start."""
    found_run: bool = False
    """Whether that is because the folder holds another run."""


def plan_start(config: RunConfig, *, read_all: bool = False) -> StartPlan:
    """Whether the run continues an earlier one, moves it aside, or may not touch it.

    Args:
        config: of the run.
        read_all: whether every byte of the checkpoint is compared with its manifest.
    """
    run = RunDir(Path(config.output_dir))
    obstacle = run.obstacle()
    if obstacle is not None:
        return StartPlan(
            problem=f"output_dir: {run.path} {obstacle}: choose another one with --output_dir"
        )
    steps = checkpoint_steps(run.checkpoints)
    if config.checkpoint.resume and steps:
        return _continue(config, run, read_all=read_all)
    if config.overwrite:
        needed = [path for path in paths_read(config) if run.holds(Path(path))]
        if needed:
            return StartPlan(
                problem=f"overwrite: moves aside {', '.join(needed)}, which this run reads: choose "
                "another folder with --output_dir"
            )
        return StartPlan(moves_aside=True)
    if config.checkpoint.resume:
        remedy = "add --overwrite to start from step 0"
        if not holds_run(run):
            remedy = f"leave checkpoint.resume out, or {remedy}"
        return StartPlan(
            problem=f"checkpoint.resume: {run.checkpoints} holds no checkpoint to continue from; "
            f"{remedy}"
        )
    if holds_run(run):
        found, remedy = "without a checkpoint", ""
        if steps:
            found, remedy = f"up to step {steps[-1]}", "continue it with --checkpoint.resume, "
        return StartPlan(
            problem=f"output_dir: {run.path} holds another run, {found}: {remedy}start from step 0 "
            "with --overwrite, which moves its files aside, or choose another folder with "
            "--output_dir",
            found_run=True,
        )
    return StartPlan()


def _continue(config: RunConfig, run: RunDir, *, read_all: bool) -> StartPlan:
    """The checkpoint to continue from, or why none fits."""
    choice = choose_checkpoint(run, config.checkpoint, read_all=read_all)
    step = choice.step
    if step is None:
        return StartPlan(problem=f"checkpoint.resume: {choice.problem}")
    # A run that was killed right before its end has its last checkpoint, but no model.
    if config.max_steps is not None and (
        step > config.max_steps or (step == config.max_steps and run.final.exists())
    ):
        return StartPlan(
            problem=f"checkpoint.resume: {run.checkpoints} has step {step}, after which "
            f"max_steps = {config.max_steps} leaves nothing to do: raise --max_steps, start "
            "over with --overwrite alone, or choose another folder with --output_dir"
        )
    checkpoint = run.checkpoints / f"step-{step}"
    other = (
        _other_method(config, checkpoint)
        or _other_model(config, checkpoint)
        or refused_change(config, run, checkpoint)
    )
    return StartPlan(problem=other) if other else StartPlan(step, damaged=choice.damaged)


def _other_method(config: RunConfig, checkpoint: Path) -> str | None:
    """What to do with a checkpoint of another command; None if it may be of this one."""
    files = (ROLLOUTS_FILE, DATA_FILE) if config.has_rollouts else (DATA_FILE, ROLLOUTS_FILE)
    own, others = (checkpoint / name for name in files)
    if own.exists() or not others.exists():
        return None
    return (
        f"checkpoint.resume: {checkpoint} was not written by `rlsys {config.command}`: to begin "
        "with its weights, set model.path to it, and choose another folder with --output_dir"
    )


def _other_model(config: RunConfig, checkpoint: Path) -> str | None:
    """What differs between a checkpoint and the config's model; None if they fit.

    A model that cannot be read from here is left to the ranks, which compare each tensor.
    """
    path, labels = config.model.path, config.num_labels
    try:
        folders = (find_model_folder(path), checkpoint)
        shapes = [read_model_shape(folder, num_labels=labels) for folder in folders]
    except ValueError:
        return None
    own, saved = map(asdict, shapes)
    differing = [key for key in own if own[key] != saved[key]]
    if not differing:
        return None
    values = [f"{key} {saved[key]}, there {own[key]}" for key in differing if key != "layers"]
    return (
        f"checkpoint.resume: {checkpoint} is of another model than model.path {path} "
        f"({'; '.join(values[:3]) or 'its layers differ'}): set model.path to the model that the "
        "run began with, or start over with --overwrite alone"
    )


def output_dir_problems(config: RunConfig) -> Iterator[Problem]:
    """What keeps the run from starting in its folder."""
    run = RunDir(Path(config.output_dir))
    problem = run.held_elsewhere() if run.is_held() else plan_start(config).problem
    if problem is not None:
        yield Problem(problem, only_here=True)
