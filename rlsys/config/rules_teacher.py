"""Rules about the teacher, the frozen model that the policy learns from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlsys.problems import Problem
from rlsys.text import near_multiples

if TYPE_CHECKING:
    from rlsys.config.schema import Config, RunConfig, Section, TeacherConfig


def teacher_problems(config: Config) -> Iterator[Problem]:
    """Rules of on-policy distillation within GRPO that `config` breaks."""
    coef, teacher = config.grpo.opd_kl_coef, config.teacher
    if config.used_teacher is None:
        for name, value in changed_fields(teacher):
            yield Problem(
                f"teacher.{name} = {value} changes nothing, since with grpo.opd_kl_coef = 0 there "
                "is no teacher: set that, such as to 1, or leave it out"
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
    rows = config.rollout.generation_batch_size
    yield from teacher_rank_problems(config, teacher, rows, "rollout.generation_batch_size")


def changed_fields(section: Section) -> Iterator[tuple[str, Any]]:
    """(name, value) of fields that are not as by default; a run's saved config names those too."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value != field.get_default(call_default_factory=True):
            yield name, value


def teacher_rank_problems(
    config: RunConfig, teacher: TeacherConfig, num_rows: int, rows_are: str
) -> Iterator[Problem]:
    """Numbers of ranks that do not fit each other, given the rows of a step."""
    tp, cp = teacher.tensor_parallel_size, teacher.context_parallel_size
    if teacher.world_size % (tp * cp):
        yield Problem(
            f"teacher.world_size = {teacher.world_size} is not a multiple of "
            f"teacher.tensor_parallel_size {tp} x context_parallel_size {cp} = {tp * cp}: use "
            f"{near_multiples(teacher.world_size, tp * cp)} ranks"
        )
    elif teacher.num_replicas > num_rows:
        yield Problem(
            f"teacher.world_size = {teacher.world_size} makes {teacher.num_replicas} replicas, and "
            f"a step has {num_rows} rows for them ({rows_are}): use at most {num_rows * tp * cp} "
            "ranks, or more rows"
        )
    ranks = config.policy.world_size
    if teacher.placement == "policy" and teacher.world_size > ranks:
        yield Problem(
            f"teacher.world_size = {teacher.world_size} is more than the policy's ranks, "
            f"policy.world_size = {ranks}, whose GPUs it shares (teacher.placement = policy): "
            "lower it, or set teacher.placement to own"
        )
