"""Everything about a run that can be checked before Ray starts.

A run that would fail in its third minute, in some actor, fails here in its first second, with all
its problems in one message. Nothing here imports torch (unless a plugin registers a loss), ray or
vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rlsys.config import Config
from rlsys.config.schema import AnyConfig
from rlsys.preflight.data import data_file_problems
from rlsys.preflight.job_copy import job_copy_problems
from rlsys.preflight.machine import (
    attention_problems,
    gpu_problems,
    option_problems,
    package_problems,
    tracker_problems,
)
from rlsys.preflight.model import model_problems
from rlsys.preflight.rewards import algorithm_plugin_problems, reward_function_problems
from rlsys.preflight.run_folder import output_dir_problems
from rlsys.problems import Problem

CHECKS: tuple[Callable[[Config], Iterable[Problem]], ...] = (
    package_problems,
    option_problems,
    model_problems,
    attention_problems,
    gpu_problems,
    data_file_problems,
    reward_function_problems,
    algorithm_plugin_problems,
    tracker_problems,  # after the plugins, which may register trackers
    output_dir_problems,
)


def check_run(config: Config) -> list[Problem]:
    """All problems of a run that can be seen from this machine without starting it."""
    return find_problems(CHECKS, config)


def find_problems(
    checks: tuple[Callable[[AnyConfig], Iterable[Problem]], ...], config: AnyConfig
) -> list[Problem]:
    """What the checks find, and then what `ray job submit` did not send."""
    problems = [problem for check in checks for problem in check(config)]
    return [*problems, *job_copy_problems(config)] if problems else []
