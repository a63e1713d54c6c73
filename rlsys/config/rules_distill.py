"""Rules between fields of a config for distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.rules_sft import sft_problems
from rlsys.config.rules_teacher import teacher_rank_problems
from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.distill import DistillConfig


def distill_problems(config: DistillConfig) -> list[Problem]:
    """Every rule between fields that `config` breaks; empty when it can run."""
    return [
        *sft_problems(config),
        *teacher_rank_problems(config, config.teacher),
        *_teacher_problems(config),
    ]


def _teacher_problems(config: DistillConfig) -> Iterator[Problem]:
    teacher = config.teacher
    if teacher.path is None:
        yield Problem(
            "teacher.path: is missing: set it to the folder or hub id of a model with the "
            "tokenizer of model.path"
        )
    if config.most_replicas > config.global_batch_size:
        yield Problem(
            f"teacher.world_size = {teacher.world_size} makes more replicas than the "
            f"{config.global_batch_size} samples of a step (policy.global_batch_size): lower it"
        )
    lora = config.policy.lora
    has_adapter = lora is not None and lora.path is not None  # it may forget what that learned
    if teacher.path == config.model.path and not has_adapter:
        yield Problem(
            f"teacher.path = {teacher.path} is model.path, which has nothing to learn from itself: "
            "name a larger or better model with the same tokenizer"
        )
