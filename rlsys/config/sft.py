"""The config of `rlsys sft`: supervised fine-tuning and continued pre-training."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from rlsys.config.rows_run import RowsRunConfig
from rlsys.config.rules_sft import sft_problems
from rlsys.config.schema import GrpoConfig, PolicyConfig, Section
from rlsys.config.schema.tracking import SftTrackingConfig
from rlsys.config.sft_data import SftDataConfig
from rlsys.problems import ProblemsError


class SftPolicyConfig(PolicyConfig):
    """The megatron-core trainer, with the defaults of supervised training."""

    global_batch_size: PositiveInt | None = None
    """Samples per optimizer step, which is a step of the run; null: one forward pass of each
    data-parallel rank."""
    micro_batch_size: PositiveInt = 8
    """Samples per forward pass of a data-parallel rank."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Tokens per forward pass of such a rank, in place of micro_batch_size; null counts
    samples."""
    lr: NonNegativeFloat = 1e-5
    """Peak learning rate of AdamW; 0 trains nothing."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay from `lr` to `min_lr` over the optimizer steps after warm-up."""
    warmup_ratio: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of all optimizer steps in which the learning rate rises linearly from 0."""


class SftSection(Section):
    """What supervised training trains on in each row."""

    objective: Literal["sft", "pretrain"] = "sft"
    """sft: answers to prompts. pretrain: every token of the column `text`."""
    loss_on: Literal["all", "last", "flag"] = "all"
    """Turns of the assistant that are trained on: all, the last one, or those whose message has
    `loss: true`. A message's own `loss` always comes first."""
    thinking: Literal["train", "ignore", "ignore_empty"] = "train"
    """Whether the thinking before an answer is trained on, left out of the loss, or left out where
    it is empty. Chat templates may drop the thinking of earlier turns: that is not trained on
    either way."""
    group_by_length: bool = False
    """Put samples of similar length into one step: fewer pad tokens where micro-batches need equal
    sizes, and less random steps. The order depends on `seed` alone."""


class SftConfig(RowsRunConfig):
    """One run of supervised training."""

    command: ClassVar[str] = "sft"
    row_noun: ClassVar[str] = "sample"

    data: SftDataConfig
    sft: SftSection = SftSection()
    policy: SftPolicyConfig = SftPolicyConfig()
    tracking: SftTrackingConfig = SftTrackingConfig()

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        problems = sft_problems(self)
        if problems:
            raise ProblemsError("the config", problems)
        return self

    @property
    def algorithm(self) -> GrpoConfig:
        """The negative log-likelihood, its mean over all tokens that are trained on in a step."""
        return GrpoConfig(loss_type="sft", loss_aggregation="token_mean")
