"""Everything about distillation that can be checked before Ray starts; as `checks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rlsys.config import DistillConfig
from rlsys.config.passed_through import megatron_option_problems
from rlsys.model.folder import find_model_folder
from rlsys.model.shape import read_model_shape
from rlsys.preflight.checks import find_problems
from rlsys.preflight.machine import (
    attention_problems,
    gpu_problems,
    package_problems,
    tracker_problems,
)
from rlsys.preflight.model import taught_model_problems
from rlsys.preflight.run_folder import output_dir_problems
from rlsys.preflight.sft import sample_file_problems
from rlsys.problems import Problem


def top_k_problems(config: DistillConfig) -> Iterator[Problem]:
    """Whether the teacher has more tokens than it is asked for."""
    k = config.distill.loss_top_k
    if not k or config.teacher_path is None:
        return
    try:
        folders = [find_model_folder(path) for path in (config.model.path, config.teacher_path)]
        sizes = [read_model_shape(folder, may_bridge=True).vocab_size for folder in folders]
    except ValueError:
        return  # `taught_model_problems` says what is wrong with it
    if k >= min(sizes):
        yield Problem(
            f"distill.loss_top_k = {k} is not less than the {min(sizes)} tokens that policy and "
            "teacher share: use fewer, or 0, which compares over all"
        )


DISTILL_CHECKS: tuple[Callable[[DistillConfig], Iterable[Problem]], ...] = (
    package_problems,
    megatron_option_problems,
    taught_model_problems,
    top_k_problems,
    attention_problems,
    gpu_problems,
    sample_file_problems,
    tracker_problems,
    output_dir_problems,
)


def check_distill_run(config: DistillConfig) -> list[Problem]:
    """All problems of a run that can be seen from this machine without starting it."""
    return find_problems(DISTILL_CHECKS, config)
