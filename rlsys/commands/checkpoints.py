"""`rlsys checkpoints RUN`: the checkpoints of a run, which are whole, and which is continued."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from rlsys.commands.console import make_console
from rlsys.config import CheckpointConfig
from rlsys.config.yaml_text import read_yaml
from rlsys.files import bytes_in, size_text
from rlsys.model.weight_files import MANIFEST_FILE
from rlsys.run.folder import RunDir
from rlsys.run.kept import best_first, checkpoint_steps, metric_by_step
from rlsys.run.manifest import checkpoint_problem


def main(args: argparse.Namespace) -> bool:
    """Print the checkpoints of `args.run_dir`, the oldest first.

    Returns:
        whether all are whole.

    Raises:
        ValueError: it is not a run, or has no checkpoints.
    """
    run = RunDir(args.run_dir)
    steps = checkpoint_steps(run.checkpoints)
    if not steps:
        raise ValueError(f"{run.path} has no checkpoints: name the output_dir of a run that saved")
    config = _settings(run)
    if args.metric is not None:
        config = config.model_copy(update={"metric_for_best_model": args.metric})
    problems = {
        step: checkpoint_problem(run.checkpoints / f"step-{step}", read_all=args.verify)
        for step in steps
    }
    whole = [step for step in steps if problems[step] is None]
    best = next(iter(best_first(run, whole, config)), None)
    metric = config.best_metric
    values = {} if metric is None else metric_by_step(run.metrics, metric)
    console = make_console()
    table = Table(box=None, pad_edge=False)
    for column in ("step", "written", "size", *([metric] if metric else []), "state", ""):
        table.add_column(column, overflow="fold")
    for step in steps:
        folder = run.checkpoints / f"step-{step}"
        value = [f"{values[step]:.6g}" if step in values else ""] if metric else []
        table.add_row(
            str(step),
            datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S"),
            size_text(bytes_in(folder)),
            *value,
            _state(folder, problems[step], verified=args.verify),
            ", ".join(_notes(step, whole, best, config)),
        )
    console.print(table)
    if not args.verify:
        console.print(Text("names and sizes were compared; --verify reads every byte", "dim"))
    return len(whole) == len(steps)


def _settings(run: RunDir) -> CheckpointConfig:
    """The section `checkpoint` of the run's config; defaults where that cannot be read."""
    try:
        values = read_yaml(run.config)
        return CheckpointConfig.model_validate(values["checkpoint"])
    except (OSError, ValueError, ValidationError, KeyError, TypeError):
        return CheckpointConfig()


def _state(folder: Path, problem: str | None, *, verified: bool) -> Text:
    if problem is not None:
        return Text(f"damaged: {problem}", "bold red")
    if not (folder / MANIFEST_FILE).is_file():
        return Text("no manifest: an older rlsys wrote it", "yellow")
    return Text("good, every byte" if verified else "good", "green")


def _notes(
    step: int, whole: list[int], best: int | None, config: CheckpointConfig
) -> Iterator[str]:
    if [step] == whole[-1:]:
        yield "newest: --checkpoint.resume"
    if step == best:
        yield "best: --checkpoint.resume best"
    if config.save_retain_interval is not None and step % config.save_retain_interval == 0:
        yield "kept for good"
