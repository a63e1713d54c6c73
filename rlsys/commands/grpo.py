"""`rlsys grpo CONFIG`: train. The config is loaded and checked before Ray is imported."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rlsys import attempts
from rlsys.commands.grpo_restarts import run_attempts
from rlsys.config import Config, RunConfig
from rlsys.config.load import ResolvedConfig, load_config_as
from rlsys.config.schema import AnyConfig
from rlsys.files import unused_folder
from rlsys.preflight.checks import check_run
from rlsys.preflight.positions import within_positions
from rlsys.preflight.run_folder import plan_start
from rlsys.problems import Problem, ProblemsError


def main(args: argparse.Namespace) -> int | None:
    """Train with `args.config` and `args.overrides`; returns the exit code of the last attempt."""
    resolved = checked(Config, check_run, args.config, args.overrides)
    if watches(resolved.config):
        return run_attempts(resolved.config, args.config, args.overrides)
    from rlsys.launch import run

    run(resolved)
    return None


def watches(config: RunConfig) -> bool:
    """Whether this process only starts the driver, as often as max_restarts says."""
    return config.max_restarts > 0 and attempts.attempt() is None


def checked(
    schema: type[AnyConfig],
    check: Callable[[AnyConfig], list[Problem]],
    path: str,
    overrides: Sequence[str],
) -> ResolvedConfig[AnyConfig]:
    """The config, which can run on this machine.

    Raises:
        ProblemsError: it cannot.
    """
    resolved = within_positions(load_config_as(schema, path, overrides))
    if attempts.continues():
        resolved = continued(resolved)
    problems = check(resolved.config)
    if problems:
        found_run = plan_start(resolved.config).found_run
        folder = Path(resolved.config.output_dir)
        command = resolved.config.command
        note = in_another_folder(command, path, overrides, folder) if found_run else None
        raise ProblemsError(path, problems, note=note)
    return resolved


def continued(resolved: ResolvedConfig[AnyConfig]) -> ResolvedConfig[AnyConfig]:
    """The config of an attempt that goes on from the newest checkpoint of the one before."""
    config = resolved.config
    checkpoint = config.checkpoint.model_copy(update={"resume": True})
    update = {"checkpoint": checkpoint, "overwrite": True}
    return replace(resolved, config=config.model_copy(update=update))


def in_another_folder(command: str, path: str, overrides: Sequence[str], folder: Path) -> str:
    """The user's command with an unused output_dir."""
    words, _ = split_output_dir(overrides)
    again = ["rlsys", command, path, *words, "--output_dir", str(unused_folder(folder))]
    return f"In another folder:\n  {shlex.join(again)}"


def split_output_dir(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without the first `--output_dir FOLDER`, and these two words."""
    words = list(overrides)
    for index, word in enumerate(words):
        name, has_value, _ = word.lstrip("-+").partition("=")
        if name.replace("-", "_") == "output_dir" and (has_value or word.startswith("-")):
            end = index + (1 if has_value else 2)
            return words[:index] + words[end:], words[index:end]
    return words, []
