"""Rules between fields of a config for distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.distill_sampling import sampling_problems
from rlsys.config.rules_sft import sft_problems
from rlsys.config.rules_teacher import changed_fields, teacher_rank_problems
from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.distill import DistillConfig


def distill_problems(config: DistillConfig) -> list[Problem]:
    """Every rule between fields that `config` breaks; empty when it can run."""
    return [
        *sft_problems(config),
        *teacher_rank_problems(
            config, config.teacher, config.rows_per_step, "policy.global_batch_size"
        ),
        *_teacher_problems(config),
        *_student_problems(config),
    ]


def _teacher_problems(config: DistillConfig) -> Iterator[Problem]:
    teacher = config.teacher
    if teacher.path is None:
        yield Problem(
            "teacher.path: is missing: set it to the folder or hub id of a model with the "
            "tokenizer of model.path"
        )
    lora = config.policy.lora
    has_adapter = lora is not None and lora.path is not None  # it may forget what that learned
    if teacher.path == config.model.path and not has_adapter:
        yield Problem(
            f"teacher.path = {teacher.path} is model.path, which has nothing to learn from itself: "
            "name a larger or better model with the same tokenizer"
        )


def _student_problems(config: DistillConfig) -> Iterator[Problem]:
    """Rules about the student's own completions."""
    lmbda, sft = config.distill.lmbda, config.sft
    if not lmbda:
        for section in ("rollout", "weight_sync"):
            for name, value in changed_fields(getattr(config, section)):
                yield Problem(
                    f"{section}.{name} = {value} changes nothing, since with distill.lmbda = 0 the "
                    "student samples nothing: leave it out, or set lmbda above 0"
                )
        return
    for name, value, usual in (
        ("sft.objective", sft.objective, "sft"),
        ("sft.thinking", sft.thinking, "train"),
    ):
        if value != usual:
            yield Problem(
                f"{name} = {value} leaves no whole answer that the student could write itself, and "
                f"distill.lmbda = {lmbda:g}: set lmbda to 0, or {name} to {usual}"
            )
    tokens = config.policy.max_tokens_per_micro_batch
    if tokens is not None and config.data.max_length <= tokens < config.longest_row:
        yield Problem(
            f"policy.max_tokens_per_micro_batch = {tokens} does not hold {config.longest_row_is} = "
            f"{config.longest_row} tokens, the longest completion behind the longest prompt: raise "
            "it, or lower rollout.max_completion_length or data.max_length"
        )
    yield from sampling_problems(config)
