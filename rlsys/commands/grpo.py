"""`rlsys grpo CONFIG`: train. The config is loaded and checked before Ray is imported."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from rlsys.config.load import ResolvedConfig, load_config
from rlsys.files import unused_folder
from rlsys.preflight.checks import check_run
from rlsys.preflight.run_folder import plan_start
from rlsys.problems import ProblemsError


def main(args: argparse.Namespace) -> None:
    """Train with `args.config` and `args.overrides`."""
    resolved = load_runnable(args.config, args.overrides)
    from rlsys.launch import run

    run(resolved)


def load_runnable(path: str, overrides: Sequence[str]) -> ResolvedConfig:
    """The config, which can run on this machine.

    Raises:
        ProblemsError: it cannot.
    """
    resolved = load_config(path, overrides)
    problems = check_run(resolved.config)
    if problems:
        found_run = plan_start(resolved.config).found_run
        folder = Path(resolved.config.output_dir)
        note = in_another_folder(path, overrides, folder) if found_run else None
        raise ProblemsError(path, problems, note=note)
    return resolved


def in_another_folder(path: str, overrides: Sequence[str], folder: Path) -> str:
    """The user's command with an unused output_dir."""
    words, _ = split_output_dir(overrides)
    command = ["rlsys", "grpo", path, *words, "--output_dir", str(unused_folder(folder))]
    return f"In another folder:\n  {shlex.join(command)}"


def split_output_dir(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without the first `--output_dir FOLDER`, and these two words."""
    words = list(overrides)
    for index, word in enumerate(words):
        name, has_value, _ = word.lstrip("-+").partition("=")
        if name.replace("-", "_") == "output_dir" and (has_value or word.startswith("-")):
            end = index + (1 if has_value else 2)
            return words[:index] + words[end:], words[index:end]
    return words, []
