"""The config of `rlsys preference`: training on answers that people, or a model, compared."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rlsys.config.dataset_spec import model_of_modelscope
from rlsys.config.rows_run import MeasuredRowsConfig, RowsRunConfig
from rlsys.config.rules_preference import preference_problems
from rlsys.config.schema import GrpoConfig, ReferenceConfig, Section
from rlsys.config.schema.profile import ProfiledRole
from rlsys.config.schema.tracking import SftTrackingConfig
from rlsys.config.sft import SftPolicyConfig
from rlsys.problems import ProblemsError

PreferenceLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "cpo",
    "simpo",
    "orpo",
    "kto",
    "apo_zero_unpaired",
]
UNPAIRED_LOSSES = ("kto", "apo_zero_unpaired")
"""Losses of single answers with a label."""
REFERENCE_FREE_LOSSES = ("cpo", "simpo", "orpo")
"""Losses that know no reference."""
_DEFAULT_BETA, _SIMPO_BETA = 0.1, 2.0


class PreferenceSection(Section):
    """The loss of preference training."""

    loss_type: PreferenceLoss = "sigmoid"
    """sigmoid: DPO (arXiv:2305.18290). sigmoid_norm: of the mean log ratio of a token, DPO
    normalised by length. hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero,
    apo_down: others with a reference, as in TRL's DPO, not its CPO. cpo, simpo, orpo: without one.
    kto, apo_zero_unpaired: single answers with a label."""
    beta: PositiveFloat | None = None
    """Scale of the log ratios to the reference, or of log-probs without one: lower lets the policy
    go further. With orpo the weight of the odds ratio (lambda of the paper), with ipo its tau.
    null: 0.1, and 2.0 with simpo."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs whose labels are assumed to be wrong: above 0 for robust and exo_pair, and for
    cpo and simpo if wanted."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """Divergence from the reference (arXiv:2309.16240), whose derivative makes scores of log
    ratios, for sigmoid, sigmoid_norm, hinge, ipo, robust and exo_pair."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of alpha_divergence; 1 is reverse_kl."""
    reference_free: bool = False
    """Compare with a reference that finds all answers equally likely, in place of a model; the KL
    of kto is 0 then."""
    rpo_alpha: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood of chosen answers, its mean over their tokens in a
    step, beside the losses with a reference (RPO, arXiv:2404.19733)."""
    cpo_alpha: NonNegativeFloat | None = None
    """The same weight for cpo and simpo. null: 1.0 with cpo, 0.0 with simpo."""
    simpo_gamma: NonNegativeFloat = 1.0
    """Margin by which simpo wants the reward of the chosen answer to be larger."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable answers, for kto and apo_zero_unpaired."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable answers, for kto and apo_zero_unpaired."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs of all answers once, before the first step, and end the
    reference. Not with data.streaming, nor with kto, whose KL needs it in every step."""

    @property
    def scale(self) -> float:
        """beta, decided."""
        if self.beta is not None:
            return self.beta
        return _SIMPO_BETA if self.loss_type == "simpo" else _DEFAULT_BETA

    @property
    def nll_weight(self) -> float:
        """Weight of the negative log-likelihood of chosen answers."""
        if self.loss_type == "orpo":
            return 1.0
        if self.loss_type in ("cpo", "simpo"):
            default = 1.0 if self.loss_type == "cpo" else 0.0
            return default if self.cpo_alpha is None else self.cpo_alpha
        return self.rpo_alpha

    @property
    def reads_means(self) -> bool:
        """Whether the loss reads the mean log-prob of an answer's tokens, and not their sum."""
        return self.loss_type in ("simpo", "orpo")

    @property
    def is_paired(self) -> bool:
        """Whether a row has two answers that are compared."""
        return self.loss_type not in UNPAIRED_LOSSES

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with a model."""
        return not self.reference_free and self.loss_type not in REFERENCE_FREE_LOSSES

    @property
    def no_reference_because(self) -> str:
        """Why there is nothing to compare with, for messages."""
        if self.reference_free:
            return "preference.reference_free is true"
        return f"preference.loss_type = {self.loss_type} knows no reference"

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss needs KTO's estimate of the KL to the reference."""
        return self.loss_type == "kto" and self.has_reference


class PreferenceDataConfig(MeasuredRowsConfig):
    """Where answers come from."""

    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with an answer, in tokens; see `truncation_strategy`. The default is less for
    a model with fewer positions."""
    truncation_strategy: Literal["delete", "error"] = "delete"
    """What happens to rows with an answer over `max_length`. delete: dropped and counted; error:
    the run does not start."""
    max_eval_samples: PositiveInt | None = None
    """Held-out rows to evaluate on, in each set; the first ones are taken. null takes all."""


class PreferencePolicyConfig(SftPolicyConfig):
    """The megatron-core trainer, with the defaults of preference training."""

    global_batch_size: PositiveInt | None = None
    """Rows (pairs, or single answers) per optimizer step, which is a step of the run; null: one
    forward pass of each data-parallel rank."""
    micro_batch_size: PositiveInt = 4
    """Rows per forward pass of a data-parallel rank. A pair is never divided."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Tokens per forward pass of such a rank, in place of micro_batch_size; null counts rows."""
    lr: NonNegativeFloat = 1e-6
    """Peak learning rate of AdamW; 0 trains nothing."""


class PreferenceAlgorithm(GrpoConfig):
    """The loss of preference training, in the place of a policy loss."""

    preference: PreferenceSection


class PreferenceConfig(RowsRunConfig):
    """One run of preference training."""

    command: ClassVar[str] = "preference"
    row_noun: ClassVar[str] = "row"

    data: PreferenceDataConfig
    preference: PreferenceSection = PreferenceSection()
    reference: ReferenceConfig = ReferenceConfig()
    policy: PreferencePolicyConfig = PreferencePolicyConfig()
    tracking: SftTrackingConfig = SftTrackingConfig()

    @model_validator(mode="after")
    def _further_ids_name_their_hub(self) -> Self:
        if self.hub == "modelscope" and self.reference.path is not None:
            self._change("reference", path=model_of_modelscope(self.reference.path))
        return self

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        problems = preference_problems(self)
        if problems:
            raise ProblemsError("the config", problems)
        return self

    @property
    def rows_together(self) -> int:
        """The answers of a row."""
        return 2 if self.preference.is_paired else 1

    @property
    def algorithm(self) -> PreferenceAlgorithm:
        """The section `preference`; each answer weighs as much as any other."""
        return PreferenceAlgorithm(
            loss_type="preference",
            loss_aggregation="seq_mean_token_sum",
            preference=self.preference,
        )

    @property
    def profiled_roles(self) -> list[ProfiledRole]:
        """See RunConfig."""
        return ["policy", "reference"] if self.has_reference_model else ["policy"]

    @property
    def largest_context_parallel_size(self) -> int:
        """Context-parallel ranks of the policy, or of the reference if it has more."""
        reference = self.reference.context_parallel_size if self.has_reference_model else 1
        return max(self.policy.context_parallel_size, reference)

    @property
    def policy_shares_gpus(self) -> bool:
        """Whether the reference computes on the policy's GPUs while it waits."""
        return self.has_reference_model and self.reference.placement == "policy"

    @property
    def model_paths(self) -> list[str]:
        """Policy and reference."""
        return [*super().model_paths, self.reference_path]

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference is the policy with its LoRA adapter off."""
        is_own = self.reference.path is None
        return self.preference.has_reference and self.policy.lora is not None and is_own

    @property
    def has_reference_model(self) -> bool:
        """Whether the run has a reference that is a model of its own."""
        return self.preference.has_reference and not self.reference_is_base

    @property
    def most_replicas(self) -> int:
        """Replicas of policy or reference, whichever has more: each needs a row of a batch."""
        of_reference = self.reference.num_replicas if self.has_reference_model else 1
        return max(self.data_parallel_size, of_reference)

    @property
    def reference_path(self) -> str:
        """Model folder or hub id of the reference."""
        return self.reference.path or self.model.path
