"""What every loss has in common: its input, the registry, and how token losses become the loss.

A loss reads a `LossInput` and the `grpo` section of the config, and returns

- the loss: the sum of `weights * token_losses` over the micro-batch. The weights hold the
  denominators of the whole optimizer step (`weighting.loss_weights`), so the losses and gradients
  of micro-batches add up to the step's;
- statistics, which combine over micro-batches and ranks as `update_metrics.MetricSums` says: sums
  over the tokens that are trained on, reported as means, or extremes if the key ends in /min or
  /max.

Example: a loss of your own, in one function. `policy_loss` adds what all losses share.

    @register_loss("reinforce_squared")
    def reinforce_squared(inputs, config):
        token_losses_T = -inputs.advantages.square() * inputs.logprobs
        return policy_loss(inputs, config, token_losses_T)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsys.algo.kl import KL_ESTIMATORS, k3, log_ratio
from rlsys.algo.losses.correction import correction_weights
from rlsys.algo.segments import Segments, masked_sum
from rlsys.config.algorithm import WARM_START_LOSSES
from rlsys.registry import Registry

if TYPE_CHECKING:
    from rlsys.algo.batching import PackedMicroBatch
    from rlsys.config import GrpoConfig


@dataclass(frozen=True, slots=True)
class LossInput:
    """One micro-batch, [T] each, at predicting positions (see `batching.PackedMicroBatch`)."""

    logprobs: Tensor
    """The policy's now, with gradient."""
    old_logprobs: Tensor
    """The policy's before the update."""
    ref_logprobs: Tensor | None
    """The reference model's; None if beta = 0."""
    rollout_logprobs: Tensor
    """The rollout engine's while it sampled."""
    advantages: Tensor
    """Constants, 0 where masked."""
    weights: Tensor
    """From `weighting.loss_weights`; 0 where masked."""
    mask: Tensor
    """bool, True where the predicted token is trained on. Log-probs elsewhere are never read."""
    segments: Segments
    """Which sequence each token is in."""
    entropy: Tensor | None = None
    """The policy's now, with gradient; None reports none."""
    is_likeliest: Tensor | None = None
    """1 where the policy now finds no token likelier than the target, else 0; None reports
    nothing."""
    divergence: Tensor | None = None
    """From the teacher's distribution, with gradient; None without a teacher. Then `logprobs`,
    `entropy` and `is_likeliest` have none."""
    teacher_entropy: Tensor | None = None
    """Of the teacher's distribution."""
    high_covariance: Tensor | None = None
    """bool, from `weighting.tokens_of_high_covariance`; None for other losses."""
    is_chosen: Tensor | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    """Of the sequences, see `TrainBatch`; the last sequence may be filling without a value."""

    @classmethod
    def from_packed(
        cls,
        packed: PackedMicroBatch,
        logprobs_T: Tensor,
        entropy_T: Tensor | None = None,
        is_likeliest_T: Tensor | None = None,
        divergence_T: Tensor | None = None,
        teacher_entropy_T: Tensor | None = None,
    ) -> LossInput:
        """Join a micro-batch with the policy's log-probs of its targets.

        Without `packed.old_logprobs` one optimizer step uses the whole rollout, so the policy
        before the update is the policy now: the ratio is 1, its gradient is that of the log-prob.
        """
        old_T = logprobs_T.detach() if packed.old_logprobs is None else packed.old_logprobs
        return cls(
            logprobs=logprobs_T,
            old_logprobs=old_T,
            ref_logprobs=packed.ref_logprobs,
            rollout_logprobs=packed.rollout_logprobs,
            advantages=packed.advantages,
            weights=packed.weights,
            mask=packed.loss_mask,
            segments=Segments.from_cu_seqlens(packed.cu_seqlens, len(packed.targets)),
            entropy=entropy_T,
            is_likeliest=is_likeliest_T,
            divergence=divergence_T,
            teacher_entropy=teacher_entropy_T,
            high_covariance=packed.high_covariance,
            is_chosen=packed.is_chosen,
            ref_logps=packed.ref_logps,
            kl=packed.kl,
        )

    def ratio(self) -> Tensor:
        """[T] `exp(logprobs - old_logprobs)` with gradient, bounded; 1 where masked."""
        return log_ratio(self.logprobs, self.old_logprobs, self.mask).exp()


LossFunction = Callable[[LossInput, "GrpoConfig"], tuple[Tensor, dict[str, Tensor]]]

losses: Registry[LossFunction] = Registry("loss", unlisted=WARM_START_LOSSES)
register_loss = losses.register


def importance_ratio(inputs: LossInput, config: GrpoConfig) -> Tensor:
    """[T] policy now / policy before the update, by `importance_sampling_level`.

    - "token": of the token;
    - "sequence": `s = exp(mean of the sequence's log ratios)`, GSPO (arXiv:2507.18071), equation 7;
    - "sequence_token": s in value, with the gradient of the token alone, equation 14.
    """
    level = config.loss_settings.importance_sampling_level
    if level == "token":
        return inputs.ratio()
    log_ratio_T = log_ratio(inputs.logprobs, inputs.old_logprobs, inputs.mask)
    mean_T = inputs.segments.means(log_ratio_T, inputs.mask)
    if level == "sequence":
        return mean_T.exp()
    own_T = log_ratio(inputs.logprobs, inputs.logprobs.detach(), inputs.mask)
    return (mean_T.detach() + own_T).exp()


def policy_loss(
    inputs: LossInput,
    config: GrpoConfig,
    token_losses_T: Tensor,
    statistics: dict[str, Tensor] | None = None,
    *,
    corrected: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch from the policy's token losses, and what every loss reports.

    `correction * policy + beta * KL - entropy_coef * entropy` for each token, weighted.

    Args:
        inputs: the micro-batch.
        config: says what is added.
        token_losses_T: the policy's, without KL and entropy.
        statistics: further statistics of this loss.
        corrected: True if the token losses include the off-policy correction.
    """
    weights_T, of_correction = correction_weights(inputs, config)
    extra = (statistics or {}) | of_correction
    if weights_T is not None and not corrected:
        token_losses_T = weights_T * token_losses_T
    if inputs.high_covariance is not None:
        extra["clip_ratio/cov_mean"] = masked_sum(inputs.high_covariance, inputs.mask)
    if inputs.ref_logprobs is not None:
        kl_T = reference_kl(inputs, config)
        extra["kl"] = masked_sum(kl_T, inputs.mask)
        if not config.kl_in_reward:
            token_losses_T = token_losses_T + config.beta * kl_T
    if config.entropy_coef:
        assert inputs.entropy is not None
        token_losses_T = token_losses_T - config.entropy_coef * inputs.entropy
    loss = weighted_sum(inputs, token_losses_T)
    return loss, token_statistics(inputs, loss) | extra | _sampling_statistics(inputs, config)


def reference_kl(inputs: LossInput, config: GrpoConfig) -> Tensor:
    """[T] estimates of KL(policy || reference), with gradient.

    The gradient of an estimate misses that the samples depend on the policy, or on an older one.
    `use_bias_correction_kl` multiplies by the ratio of the policy to the sampler, whose gradient is
    the missing part: DeepSeek-V3.2 (arXiv:2512.02556), section 3.1. The sampler is the policy
    before the update, or with `rollout_is` the rollout engine.
    """
    assert inputs.ref_logprobs is not None
    estimate = KL_ESTIMATORS[config.kl_estimator or "k3"]
    kl_T = estimate(log_ratio(inputs.ref_logprobs, inputs.logprobs, inputs.mask))
    if not config.use_bias_correction_kl:
        return kl_T
    sampler_T = inputs.rollout_logprobs if config.corrects_rollouts else inputs.old_logprobs
    return log_ratio(inputs.logprobs, sampler_T, inputs.mask).exp() * kl_T


def weighted_sum(inputs: LossInput, token_losses_T: Tensor) -> Tensor:
    """The loss of a micro-batch, its share of the optimizer step's loss."""
    # 0 * nan is nan, so a weight of 0 is not enough to leave a token out.
    return (inputs.weights * token_losses_T.masked_fill(~inputs.mask, 0.0)).sum()


def token_statistics(inputs: LossInput, loss: Tensor) -> dict[str, Tensor]:
    """What even a supervised loss reports: its value, its number of tokens, their entropy."""
    statistics = {
        "loss": loss.detach().double(),
        "num_loss_tokens": inputs.mask.sum(dtype=torch.float64),
    }
    if inputs.entropy is not None:
        statistics["entropy"] = masked_sum(inputs.entropy, inputs.mask)
    return statistics


def clip_statistics(
    inputs: LossInput, low_clipped_T: Tensor, high_clipped_T: Tensor
) -> dict[str, Tensor]:
    """Shares of tokens clipped from below and from above."""
    return {
        "clip_ratio/low_mean": masked_sum(low_clipped_T, inputs.mask),
        "clip_ratio/high_mean": masked_sum(high_clipped_T, inputs.mask),
        "clip_ratio/region_mean": masked_sum(low_clipped_T | high_clipped_T, inputs.mask),
    }


def ratio_statistics(inputs: LossInput, ratio_T: Tensor) -> dict[str, Tensor]:
    """Mean and extremes of the factor of the advantages."""
    ratio_T = ratio_T.detach()
    return {
        "ratio/mean": masked_sum(ratio_T, inputs.mask),
        "ratio/min": ratio_T.masked_fill(~inputs.mask, torch.inf).amin(),
        "ratio/max": ratio_T.masked_fill(~inputs.mask, -torch.inf).amax(),
    }


def _sampling_statistics(inputs: LossInput, config: GrpoConfig) -> dict[str, Tensor]:
    """|trainer - engine|. With max_staleness it includes policy updates since the sampling."""
    # If old_logprobs are the engine's, the trainer's own are the current policy's. Of these
    # `combine_optimizer_steps` reports the first step's, before the policy moved.
    own_T = inputs.logprobs.detach() if config.old_logprobs == "rollout" else inputs.old_logprobs
    rollout_T, mask_T = inputs.rollout_logprobs, inputs.mask
    difference_T = (own_T - rollout_T).abs().masked_fill(~mask_T, 0.0)
    return {
        "sampling/logp_difference/mean": masked_sum(difference_T, mask_T),
        "sampling/logp_difference/max": difference_T.amax(),
        "sampling/kl": masked_sum(k3(log_ratio(own_T, rollout_T, mask_T)), mask_T),
    }
