"""Rules about the teacher, the frozen model that the policy learns from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem
from rlsys.text import near_multiples

if TYPE_CHECKING:
    from rlsys.config.schema import Config, RunConfig, TeacherConfig


def teacher_problems(config: Config) -> Iterator[Problem]:
    """Rules of on-policy distillation within GRPO that `config` breaks."""
    coef, teacher = config.grpo.opd_kl_coef, config.teacher
    if config.used_teacher is None:
        if teacher.path is not None:
            yield Problem(
                f"teacher.path = {teacher.path} teaches nothing with grpo.opd_kl_coef = 0: set "
                "that, such as to 1, or leave teacher.path out"
            )
        return
    if teacher.path is None:
        yield Problem(
            f"grpo.opd_kl_coef = {coef:g} needs a teacher: set teacher.path to a model with the "
            "policy's tokenizer, or leave opd_kl_coef out"
        )
    if config.rollout.dynamic_sample:
        yield Problem(
            "rollout.dynamic_sample replaces groups whose rewards are all equal because they teach "
            f"nothing, but with grpo.opd_kl_coef = {coef:g} the teacher says something of every "
            "token: leave dynamic_sample out"
        )
    yield from teacher_rank_problems(config, teacher)


def teacher_rank_problems(config: RunConfig, teacher: TeacherConfig) -> Iterator[Problem]:
    """Numbers of ranks that do not fit each other."""
    tp, cp = teacher.tensor_parallel_size, teacher.context_parallel_size
    if teacher.world_size % (tp * cp):
        yield Problem(
            f"teacher.world_size = {teacher.world_size} is not a multiple of "
            f"teacher.tensor_parallel_size {tp} x context_parallel_size {cp} = {tp * cp}: use "
            f"{near_multiples(teacher.world_size, tp * cp)} ranks"
        )
    ranks = config.policy.world_size
    if teacher.placement == "policy" and teacher.world_size > ranks:
        yield Problem(
            f"teacher.world_size = {teacher.world_size} is more than the policy's ranks, "
            f"policy.world_size = {ranks}, whose GPUs it shares (teacher.placement = policy): "
            "lower it, or set teacher.placement to own"
        )
