"""Everything about supervised training that can be checked before Ray starts; as `checks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from rlsys.config import SftConfig
from rlsys.config.passed_through import megatron_option_problems
from rlsys.data.samples import SampleRules, SampleSource
from rlsys.preflight.checks import find_problems
from rlsys.preflight.data import count_rows, lacks_template, source_problems
from rlsys.preflight.machine import (
    attention_problems,
    gpu_problems,
    package_problems,
    tracker_problems,
)
from rlsys.preflight.model import policy_model_problems
from rlsys.preflight.run_folder import output_dir_problems
from rlsys.problems import Problem
from rlsys.text import counted


def sample_file_problems(config: SftConfig) -> Iterator[Problem]:
    """Problems of data plugins, dataset entries, files and their first rows; too few rows."""
    needs_template = config.sft.objective == "sft" and config.data.prompt_template is None
    no_template = needs_template and lacks_template(Path(config.model.path))
    kind = partial(SampleSource, rules=SampleRules.of(config))
    yield from source_problems(config.data, no_template, kind)
    rows = count_rows(config.data)
    if config.sft.objective == "sft" and rows is not None and 0 < rows < config.rows_per_step:
        yield too_few(config, rows)


def too_few(config: SftConfig, rows: int) -> Problem:
    """Fewer samples than a step takes."""
    return Problem(
        f"data.dataset has {counted(rows, 'sample')} to train on, and a step takes "
        f"{config.rows_per_step} (policy.global_batch_size): give more data, or lower it"
    )


SFT_CHECKS: tuple[Callable[[SftConfig], Iterable[Problem]], ...] = (
    package_problems,
    megatron_option_problems,
    policy_model_problems,
    attention_problems,
    gpu_problems,
    sample_file_problems,
    tracker_problems,
    output_dir_problems,
)


def check_sft_run(config: SftConfig) -> list[Problem]:
    """All problems of a run that can be seen from this machine without starting it."""
    return find_problems(SFT_CHECKS, config)
