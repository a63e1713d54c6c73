"""The algorithm: the section `grpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rlsys.config.algorithm import (
    PRESETS,
    Aggregation,
    Level,
    LossSettings,
    RolloutCorrection,
    RolloutRejection,
)
from rlsys.config.field_types import PathText
from rlsys.config.schema.section import Section


class GrpoConfig(Section):
    """The algorithm: Group Relative Policy Optimization (arXiv:2402.03300)."""

    beta: NonNegativeFloat = 0.0
    """Weight of the KL to the reference model; 0 builds no reference model."""
    epsilon: PositiveFloat = 0.2
    """Clip range of the ratio: [1 - epsilon_low, 1 + epsilon_high], where both are epsilon unless
    set. With gmpo the range of the log ratio: [-epsilon_low, epsilon_high]. With dppo_tv and
    dppo_kl the greatest divergence of a token's probability: epsilon_high upwards, epsilon_low
    downwards."""
    epsilon_low: PositiveFloat | None = None
    """Lower clip range (verl's clip_ratio_low); null is epsilon, and for cispo no lower bound."""
    epsilon_high: PositiveFloat | None = None
    """Upper clip range (DAPO's clip-higher); null is epsilon."""
    delta: PositiveFloat | None = None
    """Upper bound of the ratio where the advantage is negative, above 1 + epsilon_high (TRL's
    delta, c of dual-clip PPO). null: none; 3 for dual_clip. With dppo_tv and dppo_kl the bound of
    every ratio; null is 20."""
    num_iterations: PositiveInt = 1
    """Passes over one rollout (mu in the paper)."""
    max_logp_difference: PositiveFloat | None = 1.0
    """End the run where log-probs of policy and rollout engine differ by more than this, in nats
    per token on average, for the same weights. A warning comes once rounding does not explain the
    difference. With rollout.max_staleness only the first step is checked. null never ends the
    run."""
    advantage_estimator: str = "grpo"
    """What a completion is compared with: grpo (mean of its group), rloo (mean of the others of its
    group), reinforce_plus_plus (mean of the batch), reinforce_plus_plus_baseline (mean of its
    group, scaled by the batch), maxrl (mean of its group, divided by that mean)."""
    scale_rewards: Literal["auto", "group", "batch", "none"] = "auto"
    """Divide advantages by the std of rewards within the group, within the batch, or not at all.
    auto is the choice of the estimator's paper: group for grpo, none for rloo."""
    advantage_eps: PositiveFloat = 1e-4
    """Reward units added to that std."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    """Sum the reward functions, then compare; or compare each by itself, then sum (GDPO)."""
    mask_truncated_completions: bool = False
    """Do not train on completions cut at max_completion_length (DAPO's overlong filtering); they
    still count in the advantages of their group."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL to the reference model; null is k3 in the loss and k1 in the reward."""
    kl_in_reward: bool = False
    """Subtract beta * KL from the rewards instead of adding it to the loss."""
    use_bias_correction_kl: bool = False
    """Multiply the KL in the loss by policy / sampler, which makes its gradient unbiased; for stale
    data too if `rollout_is` corrects for staleness (DeepSeek-V3.2)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus, averaged over tokens as the loss is; 0 is off."""
    opd_kl_coef: NonNegativeFloat = 0.0
    """On-policy distillation: adds opd_kl_coef x (the teacher's log-prob - the policy's) to the
    advantage of each sampled token, with the model of teacher.path; 0 is off."""
    top_entropy_quantile: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens that get a policy gradient, highest entropy first;
    1 is all. Below 1 costs a forward pass."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Log-probs that the ratio starts from. auto: the trainer's before the update, computed only
    where the update's own would differ. recompute: the same, always computed.
    rollout: the rollout engine's, which saves a forward pass and clips against the
    policy that sampled."""
    rollout_is: RolloutCorrection = "auto"
    """Multiply the policy loss by old_logprobs / rollout_logprobs as probabilities: of the token,
    of the completion, or its geometric mean over tokens. Weights out of bounds are truncated, or
    set to 0 with token_mask and sequence_mask (TRL's vllm_importance_sampling_mode). auto: token
    where rollouts may be stale or quantised, else none."""
    rollout_is_threshold: PositiveFloat = 2.0
    """Upper bound of these weights (TRL's vllm_importance_sampling_clip_max)."""
    rollout_is_threshold_lower: PositiveFloat | None = None
    """Lower bound of these weights (TRL's vllm_importance_sampling_clip_min); null is none."""
    rollout_rs: RolloutRejection = "none"
    """Leave out what is out of bounds: tokens (IcePop) or completions by their weight (token,
    sequence, geometric), or by k2 or k3 of the log weights: of the token, or their sum, mean or
    maximum over the completion (verl)."""
    rollout_rs_threshold: PositiveFloat | None = None
    """Upper bound of what is kept. For weights at least 1, and null is 2; for k2 and k3 a
    divergence that must be set."""
    rollout_rs_threshold_lower: float | None = Field(default=None, ge=0.0, le=1.0)
    """Lower bound of the weights that are kept; null is 1 / rollout_rs_threshold, 0 is none.
    Divergences have no lower bound."""
    rollout_token_veto_threshold: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Leave out a completion if one of its tokens has a weight below this, such as 1e-4: the policy
    would hardly ever sample it. null leaves out none."""
    rollout_token_veto_threshold_high: float | None = Field(default=None, gt=1.0)
    """The same for tokens with a weight above this, such as 100 (SkyRL's outlier token mask)."""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Leave out completions with a negative advantage whose log-probs fell by more than this since
    sampling, in nats per token (DeepSeek-V3.2). null leaves out none."""
    external_plugins: list[PathText] = []
    """Python files that register losses or advantage estimators."""
    loss_type: str = "grpo"
    """The policy's loss: grpo, bnpo, dapo, dr_grpo, dual_clip, gspo, luspo, cispo, sapo, vespo,
    gmpo, dppo_tv, dppo_kl, clip_cov, kl_cov, reinforce; see docs/algorithm.md."""
    loss_aggregation: Aggregation | None = None
    """Average of token losses over an optimizer step of M completions. token_mean: over all tokens.
    seq_mean_token_mean: mean of each completion, over M. seq_mean_token_sum: sum / M.
    seq_mean_token_sum_norm: sum / (M * max_completion_length). null is the choice of the loss's
    paper."""
    importance_sampling_level: Level | None = None
    """Level of the ratio of the clipped losses, cispo and sapo: each token, the sequence (GSPO),
    or the sequence with each token's gradient (GSPO-token). null is sequence for gspo and luspo,
    else token."""
    sapo_temperature_pos: PositiveFloat = 1.0
    """Steepness of sapo's gate for positive advantages."""
    sapo_temperature_neg: PositiveFloat = 1.05
    """Steepness of sapo's gate for all other advantages."""
    vespo_k_pos: NonNegativeFloat = 2.0
    """Power of the sequence's ratio in vespo's weight, for advantages of 0 and more: the larger,
    the less a completion counts that became unlikely."""
    vespo_lambda_pos: PositiveFloat = 3.0
    """Decay of vespo's weight, for advantages of 0 and more: the larger, the less a completion
    counts that became likely."""
    vespo_k_neg: NonNegativeFloat = 3.0
    """The same power for negative advantages."""
    vespo_lambda_neg: PositiveFloat = 2.0
    """The same decay for negative advantages."""
    clip_cov_ratio: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens that clip_cov leaves out, at least one token: drawn from
    those whose covariance of log-prob and advantage is between clip_cov_lb and clip_cov_ub."""
    clip_cov_lb: float = 1.0
    """Least covariance of tokens that clip_cov may leave out."""
    clip_cov_ub: float = 5.0
    """Greatest covariance of tokens that clip_cov may leave out."""
    kl_cov_ratio: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens that kl_cov penalizes, at least one token: those with the
    highest covariance of log-prob and advantage."""
    ppo_kl_coef: NonNegativeFloat = 1.0
    """Weight of kl_cov's penalty, the absolute log ratio of policy and old policy."""

    @property
    def advantages_need_logprobs(self) -> bool:
        """Whether advantages depend on log-probs, and not on rewards alone."""
        return (self.kl_in_reward and self.beta > 0) or self.opd_kl_coef > 0

    @property
    def corrects_rollouts(self) -> bool:
        """Whether `rollout_is` weighs tokens."""
        return self.rollout_is not in ("auto", "none")

    @property
    def rejects_rollouts(self) -> bool:
        """Whether the difference between policy and rollout engine may leave tokens out."""
        vetoes = (self.rollout_token_veto_threshold, self.rollout_token_veto_threshold_high)
        return self.rollout_rs != "none" or vetoes != (None, None)

    @property
    def rollout_rs_bounds(self) -> tuple[float, float]:
        """Least and greatest weight or divergence that `rollout_rs` keeps."""
        upper = 2.0 if self.rollout_rs_threshold is None else self.rollout_rs_threshold
        if self.rollout_rs not in ("token", "sequence", "geometric"):
            return 0.0, upper
        lower = self.rollout_rs_threshold_lower
        return 1 / upper if lower is None else lower, upper

    @property
    def epsilons(self) -> tuple[float, float]:
        """epsilon_low and epsilon_high, decided."""
        low, high = self.epsilon_low, self.epsilon_high
        return self.epsilon if low is None else low, self.epsilon if high is None else high

    @property
    def clip_range(self) -> tuple[float, float]:
        """Least and greatest ratio that is not clipped."""
        low, high = self.epsilons
        return 1 - low, 1 + high

    @property
    def loss_settings(self) -> LossSettings:
        """The preset of `loss_type`, with the fields that are set in place of its own."""
        preset = PRESETS.get(self.loss_type, PRESETS["grpo"])
        return LossSettings(
            self.loss_aggregation or preset.loss_aggregation,
            self.importance_sampling_level or preset.importance_sampling_level,
            self.delta or preset.delta,
        )
