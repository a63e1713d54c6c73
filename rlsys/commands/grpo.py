"""`rlsys grpo CONFIG`: train. The config is loaded and checked before Ray is imported."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rlsys.config import Config
from rlsys.config.load import ResolvedConfig, load_config_as
from rlsys.config.schema import AnyConfig
from rlsys.files import unused_folder
from rlsys.preflight.checks import check_run
from rlsys.preflight.positions import within_positions
from rlsys.preflight.run_folder import plan_start
from rlsys.problems import Problem, ProblemsError


def main(args: argparse.Namespace) -> None:
    """Train with `args.config` and `args.overrides`."""
    resolved = checked(Config, check_run, args.config, args.overrides)
    from rlsys.launch import run

    run(resolved)


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
    problems = check(resolved.config)
    if problems:
        found_run = plan_start(resolved.config).found_run
        folder = Path(resolved.config.output_dir)
        command = resolved.config.command
        note = in_another_folder(command, path, overrides, folder) if found_run else None
        raise ProblemsError(path, problems, note=note)
    return resolved


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
