"""The config of `rlsys distill`: a student learns from a teacher's distributions."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from rlsys.config.algorithm import GKD
from rlsys.config.dataset_spec import model_of_modelscope
from rlsys.config.distill_sampling import DistillRolloutConfig, sampler_config
from rlsys.config.rules_distill import distill_problems
from rlsys.config.schema import Config, GrpoConfig, Section, TeacherConfig, WeightSyncConfig
from rlsys.config.sft import SftConfig
from rlsys.problems import ProblemsError


class DistillSection(Section):
    """How student and teacher are compared at each token (GKD, arXiv:2306.13649)."""

    beta: float = Field(default=0.5, ge=0.0, le=1.0)
    """The divergence: 0 is KL(teacher || student), the forward KL, 1 is KL(student || teacher), the
    reverse KL, and between them it is the generalised Jensen-Shannon divergence (TRL's beta)."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of student and teacher before they are compared."""
    loss_top_k: NonNegativeInt = 0
    """Compare over the teacher's k likeliest tokens, and all others as one (TRL's loss_top_k with
    loss_add_tail): less to compute and to send. 0 compares over the whole vocabulary."""
    lmbda: float = Field(default=0.5, ge=0.0, le=1.0)
    """Probability that a step learns from the student's own completions of its samples' prompts,
    and not from their answers (TRL's lmbda). 0 needs no rollout engine."""


class DistillConfig(SftConfig):
    """One run of distillation."""

    command: ClassVar[str] = "distill"

    teacher: TeacherConfig = TeacherConfig()
    distill: DistillSection = DistillSection()
    rollout: DistillRolloutConfig = DistillRolloutConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()

    @model_validator(mode="after")
    def _further_ids_name_their_hub(self) -> Self:
        if self.hub == "modelscope" and self.teacher.path is not None:
            self._change("teacher", path=model_of_modelscope(self.teacher.path))
        return self

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        problems = distill_problems(self)
        if problems:
            raise ProblemsError("the config", problems)
        return self

    @property
    def used_teacher(self) -> TeacherConfig | None:
        """The section `teacher`."""
        return self.teacher

    @property
    def sampler(self) -> Config | None:
        """See RunConfig; None with distill.lmbda 0."""
        return sampler_config(self) if self.distill.lmbda else None

    @property
    def longest_row(self) -> int:
        """data.max_length, and where the student samples a completion behind it."""
        return self.data.max_length + self._longest_completion

    @property
    def longest_row_is(self) -> str:
        """The fields."""
        if not self.distill.lmbda:
            return super().longest_row_is
        return "data.max_length + rollout.max_completion_length"

    @property
    def _longest_completion(self) -> int:
        return self.rollout.max_completion_length if self.distill.lmbda else 0

    @property
    def max_completion_length(self) -> int:
        """All tokens of a row may be trained on."""
        return self.longest_row

    @property
    def most_replicas(self) -> int:
        """Replicas of policy or teacher, whichever has more: each needs a row of a batch."""
        return max(self.data_parallel_size, self.teacher.num_replicas)

    @property
    def divergence(self) -> dict[str, float] | None:
        """distill.beta and distill.temperature."""
        return {"beta": self.distill.beta, "temperature": self.distill.temperature}

    @property
    def teacher_top_k(self) -> int:
        """distill.loss_top_k."""
        return self.distill.loss_top_k

    @property
    def algorithm(self) -> GrpoConfig:
        """The divergence, its mean over all tokens that are trained on in a step."""
        return GrpoConfig(loss_type=GKD, loss_aggregation="token_mean")
