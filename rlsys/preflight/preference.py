"""Everything about preference training that can be checked before Ray starts; as `checks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from rlsys.config import PreferenceConfig
from rlsys.config.passed_through import megatron_option_problems
from rlsys.data.preferences import PreferenceSource
from rlsys.preflight.checks import find_problems
from rlsys.preflight.data import count_rows, lacks_template, source_problems
from rlsys.preflight.machine import (
    attention_problems,
    gpu_problems,
    package_problems,
    tracker_problems,
)
from rlsys.preflight.model import preference_model_problems
from rlsys.preflight.run_folder import output_dir_problems
from rlsys.problems import Problem
from rlsys.text import counted


def preference_file_problems(config: PreferenceConfig) -> Iterator[Problem]:
    """Problems of data plugins, dataset entries, files and their first rows; too few rows."""
    kind = partial(PreferenceSource, is_paired=config.preference.is_paired)
    yield from source_problems(config.data, lacks_template(Path(config.model.path)), kind)
    rows = count_rows(config.data)
    if rows is not None and 0 < rows < config.rows_per_step:
        yield too_few(config, rows)


def too_few(config: PreferenceConfig, rows: int) -> Problem:
    """Fewer rows than a step takes."""
    return Problem(
        f"data.dataset has {counted(rows, 'row')} to train on, and a step takes "
        f"{config.rows_per_step} (policy.global_batch_size): give more data, or lower it"
    )


PREFERENCE_CHECKS: tuple[Callable[[PreferenceConfig], Iterable[Problem]], ...] = (
    package_problems,
    megatron_option_problems,
    preference_model_problems,
    attention_problems,
    gpu_problems,
    preference_file_problems,
    tracker_problems,
    output_dir_problems,
)


def check_preference_run(config: PreferenceConfig) -> list[Problem]:
    """All problems of a run that can be seen from this machine without starting it."""
    return find_problems(PREFERENCE_CHECKS, config)
