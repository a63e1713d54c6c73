"""The config of `rlsys reward-model`: reward models, classifiers, regression on a score head."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from rlsys.config.rows_run import MeasuredRowsConfig, RowsRunConfig
from rlsys.config.rules_reward_model import reward_model_problems
from rlsys.config.schema import GrpoConfig, NonEmptyText, Section
from rlsys.config.schema.tracking import SftTrackingConfig
from rlsys.config.sft import SftPolicyConfig
from rlsys.problems import ProblemsError

ProblemType = Literal[
    "preference", "single_label_classification", "multi_label_classification", "regression"
]
HEAD = "score"
"""The head's name in transformers' classifiers, and so in PEFT's modules_to_save."""


class ScoreDataConfig(MeasuredRowsConfig):
    """Where pairs of answers, or texts with labels, come from."""

    max_length: int = Field(default=1024, ge=2)
    """Longest conversation or text, in tokens; see `truncation_strategy`. The default is less for a
    model with fewer positions."""
    truncation_strategy: Literal["delete", "left", "right", "error"] = "delete"
    """What happens to rows over `max_length`. delete: dropped and counted, as in TRL; left, right:
    tokens are cut off at this side (a reward in GRPO keeps the last ones, as left does); error: the
    run does not start."""
    max_eval_samples: PositiveInt | None = None
    """Held-out pairs or rows to evaluate on, in each set; the first ones are taken. null takes
    all."""


class ScorePolicyConfig(SftPolicyConfig):
    """The megatron-core trainer, with the defaults of reward models."""

    global_batch_size: PositiveInt | None = None
    """Pairs, or rows with a label, per optimizer step, which is a step of the run; null: one
    forward pass of each data-parallel rank."""
    micro_batch_size: PositiveInt = 8
    """Pairs or rows per forward pass of a data-parallel rank. Both answers of a pair are in one."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Tokens per forward pass of such a rank, in place of micro_batch_size; null counts pairs or
    rows."""


class RewardModelSection(Section):
    """What the score head learns."""

    problem_type: ProblemType = "preference"
    """preference: a reward, by which the chosen answer of a pair is above the rejected one
    (Bradley-Terry). The others are transformers' losses for texts with a `label`: one class, any
    number of classes, or numbers."""
    num_labels: PositiveInt | None = None
    """Outputs of the head. null: 1 for preference and regression, else the number of
    label_names."""
    label_names: list[NonEmptyText] = Field(default=[])
    """Names of the classes in the order of their numbers, for `label` columns with names; the saved
    model's id2label has them."""
    center_rewards_coefficient: NonNegativeFloat | None = None
    """Adds this times the mean of (chosen + rejected)^2, which keeps rewards around 0 (TRL); null
    adds nothing. With preference only."""


class RewardModelConfig(RowsRunConfig):
    """One run that trains a reward model, a classifier, or a regression."""

    command: ClassVar[str] = "reward-model"
    row_noun: ClassVar[str] = "row"

    data: ScoreDataConfig
    reward_model: RewardModelSection = RewardModelSection()
    policy: ScorePolicyConfig = ScorePolicyConfig()
    tracking: SftTrackingConfig = SftTrackingConfig()

    @model_validator(mode="after")
    def _adapters_leave_the_head_whole(self) -> Self:
        """With LoRA, train the new head in full: an adapter of random numbers learns little."""
        lora = self.policy.lora
        if lora is not None and HEAD not in lora.modules_to_save:
            names = [*lora.modules_to_save, HEAD]
            self._change("policy", lora=lora.model_copy(update={"modules_to_save": names}))
        return self

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        problems = reward_model_problems(self)
        if problems:
            raise ProblemsError("the config", problems)
        return self

    @property
    def has_pairs(self) -> bool:
        """Whether a row of the data is two answers that are compared."""
        return self.reward_model.problem_type == "preference"

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        given = self.reward_model.num_labels
        return given or len(self.reward_model.label_names) or 1

    @property
    def rows_together(self) -> int:
        """Both answers of a pair."""
        return 2 if self.has_pairs else 1

    @property
    def max_completion_length(self) -> int:
        """One: the loss stands at the last token."""
        return 1

    @property
    def algorithm(self) -> GrpoConfig:
        """How rows weigh: all alike."""
        return GrpoConfig(loss_type="sft", loss_aggregation="seq_mean_token_sum")
