"""`rlsys verify RUN`: audits a run from its own files, and stops at the first difference."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from rlsys.commands.console import make_console
from rlsys.commands.verify_base import Checked, Difference, Finding, NotChecked
from rlsys.commands.verify_inputs import check_checkpoints, check_inputs
from rlsys.commands.verify_rewards import check_prompts, check_scores, load_data
from rlsys.commands.verify_steps import check_steps, read_steps
from rlsys.commands.verify_values import check_evaluations, check_filtered, check_training
from rlsys.config import Config, RunConfig
from rlsys.config.load import load_config_as
from rlsys.config.method import schema_of_command
from rlsys.problems import ProblemsError
from rlsys.records import RunRecord, open_run

WIDTH = 26
"""Of the first column."""


def main(args: argparse.Namespace) -> bool:
    """Audit a run; returns whether everything that could be checked is right.

    Raises:
        ValueError: it is not a run, or `--sample` is not a number of completions or `all`.
    """
    record = open_run(args.run_dir)
    sample = _sample(args.sample)
    console = make_console()
    try:
        for finding in _findings(record, sample):
            _print(finding, console)
    except Difference as difference:
        console.print(Text(f"DIFFERENT  {difference}", style="bold red"), soft_wrap=True)
        return False
    console.print(Text("Everything that could be checked is as recorded.", style="green"))
    return True


def _sample(word: str) -> int | None:
    if word == "all":
        return None
    if not word.isdecimal() or int(word) == 0:
        raise ValueError(f"--sample {word} should be a number of completions from 1, or all")
    return int(word)


def _findings(record: RunRecord, sample: int | None) -> Iterator[Finding]:
    """All checks, the cheap ones first."""
    config, problem = _config(record)
    if problem is not None:
        yield NotChecked("what needs the config", problem)
    yield from check_inputs(record)
    if not record.run.metrics.is_file():
        yield NotChecked("steps", f"there is no {record.run.metrics.name}")
        return
    steps = read_steps(record)
    yield from check_steps(record, config, steps)
    if isinstance(config, Config):
        if config.completions_tracking is not None and steps.training:
            data = load_data(config)
            yield from check_training(record, config, steps, data.train)
            yield from check_filtered(record, config, steps)
            yield from check_evaluations(record, config, steps, data.held_out)
            yield from check_prompts(record, steps, data)
            yield from check_scores(record, config, steps, data, sample)
        else:
            yield NotChecked("completions", "tracking.log_completions was false, or no step ended")
    yield from check_checkpoints(record)


def _config(record: RunRecord) -> tuple[RunConfig | None, str | None]:
    """The config of the run; None and why it cannot be read."""
    method = record.status.method
    if method is None:
        return None, f"{record.run.config.name} is missing or damaged"
    try:
        return load_config_as(schema_of_command(method), record.run.config).config, None
    except (ProblemsError, OSError) as error:
        lines = " ".join(str(error).split())
        return None, f"this version of rlsys cannot read it: {lines:.200}"


def _print(finding: Finding, console: Console) -> None:
    if isinstance(finding, Checked):
        line, style = f"ok           {finding.what:<{WIDTH}}  {finding.how_much}", ""
    else:
        line, style = f"not checked  {finding.what:<{WIDTH}}  {finding.why}", "yellow"
    console.print(Text(line, style=style), soft_wrap=True)
