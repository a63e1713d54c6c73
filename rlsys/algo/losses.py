"""Token losses, by name, and what they report.

A loss reads a `LossInput` and the `grpo` section of the config, and returns

- the loss: the sum of `weights * token_losses` over the micro-batch. The weights hold the
  denominators of the whole optimizer step (`batching.loss_weights`), so the losses and gradients
  of micro-batches add up to those of the step;
- statistics that combine over micro-batches and ranks as `metrics.MetricSums` says: sums over the
  tokens that are trained on, reported as their mean, or extremes if the key ends in /min or /max.

Example: a loss of your own, in one function

    @register_loss("reinforce")
    def reinforce_loss(inputs, config):
        token_losses_T = -inputs.advantages * inputs.logprobs
        loss = weighted_sum(inputs, token_losses_T)
        return loss, token_statistics(inputs, loss)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsys.algo.kl import k3, log_ratio
from rlsys.registry import Registry

if TYPE_CHECKING:
    from rlsys.algo.batching import PackedMicroBatch
    from rlsys.config import GrpoConfig


@dataclass(frozen=True, slots=True)
class LossInput:
    """One micro-batch, [T] each, at predicting positions (see `batching.PackedMicroBatch`)."""

    logprobs: Tensor
    """Of the policy now, with gradient."""
    old_logprobs: Tensor
    """Of the policy before the update."""
    ref_logprobs: Tensor | None
    """Of the reference model; None when there is none (beta = 0)."""
    rollout_logprobs: Tensor
    """Of the rollout engine while it sampled."""
    advantages: Tensor
    """Constants."""
    weights: Tensor
    """From `batching.loss_weights`; 0 where masked."""
    mask: Tensor
    """bool, True where the predicted token is trained on. Values elsewhere are never read."""
    entropy: Tensor | None = None
    """Of the policy now, without gradient: logged, not trained on. None logs none."""

    @classmethod
    def from_packed(
        cls, packed: PackedMicroBatch, logprobs_T: Tensor, entropy_T: Tensor | None = None
    ) -> LossInput:
        """Joins a micro-batch with the policy's log-probs of its targets.

        Without `packed.old_logprobs` one optimizer step uses the whole rollout, so that the policy
        before the update is the policy now: the ratio is 1, its gradient that of the log-prob.
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
            entropy=entropy_T,
        )


LossFunction = Callable[[LossInput, "GrpoConfig"], tuple[Tensor, dict[str, Tensor]]]

losses: Registry[LossFunction] = Registry("loss")
register_loss = losses.register


@register_loss("grpo")
def policy_gradient_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with a KL penalty, DeepSeekMath (arXiv:2402.03300), equation 3.

    `L_t = -min(r_t A_t, clip(r_t, 1 - epsilon, 1 + epsilon_high) A_t) + beta k3_t` with
    `r_t = exp(logprobs_t - old_logprobs_t)`: PPO (arXiv:1707.06347), equation 7, where DAPO
    (arXiv:2503.14476), section 3.1, lets the upper bound differ from the lower one.
    """
    epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    low, high = 1 - config.epsilon, 1 + epsilon_high
    advantages_T = inputs.advantages
    ratio_T = log_ratio(inputs.logprobs, inputs.old_logprobs, inputs.mask).exp()
    token_losses_T = -torch.min(ratio_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
    if inputs.ref_logprobs is not None:
        kl_T = k3(log_ratio(inputs.ref_logprobs, inputs.logprobs, inputs.mask))
        token_losses_T = token_losses_T + config.beta * kl_T
    loss = weighted_sum(inputs, token_losses_T)

    statistics = token_statistics(inputs, loss)
    if inputs.ref_logprobs is not None:
        statistics["kl"] = _sum(kl_T, inputs.mask)
    # Where min() takes the clipped term: there the token has no policy gradient.
    low_clipped_T = (ratio_T < low) & (advantages_T < 0)
    high_clipped_T = (ratio_T > high) & (advantages_T > 0)
    statistics |= {
        "clip_ratio/low_mean": _sum(low_clipped_T, inputs.mask),
        "clip_ratio/high_mean": _sum(high_clipped_T, inputs.mask),
        "clip_ratio/region_mean": _sum(low_clipped_T | high_clipped_T, inputs.mask),
        "ratio/mean": _sum(ratio_T, inputs.mask),
        "ratio/min": ratio_T.detach().masked_fill(~inputs.mask, torch.inf).amin(),
        "ratio/max": ratio_T.detach().masked_fill(~inputs.mask, -torch.inf).amax(),
    }
    return loss, statistics | _sampling_statistics(inputs)


@register_loss("sft")
def sft_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the completions, for a supervised warm start.

    Of `inputs` it reads logprobs, weights and mask, of `config` nothing.
    """
    loss = weighted_sum(inputs, -inputs.logprobs)
    return loss, token_statistics(inputs, loss)


def weighted_sum(inputs: LossInput, token_losses_T: Tensor) -> Tensor:
    """The loss of a micro-batch, its share of the optimizer step's loss."""
    # 0 * nan is nan, so a weight of 0 is not enough to leave a token out.
    return (inputs.weights * token_losses_T.masked_fill(~inputs.mask, 0.0)).sum()


def token_statistics(inputs: LossInput, loss: Tensor) -> dict[str, Tensor]:
    """What every loss reports: itself, the tokens it is over, and their entropy if known."""
    statistics = {
        "loss": loss.detach().double(),
        "num_loss_tokens": inputs.mask.sum(dtype=torch.float64),
    }
    if inputs.entropy is not None:
        statistics["entropy"] = _sum(inputs.entropy, inputs.mask)
    return statistics


def _sampling_statistics(inputs: LossInput) -> dict[str, Tensor]:
    """How far the rollout engine's log-probs are from the trainer's, for the same weights."""
    old_T, rollout_T = inputs.old_logprobs, inputs.rollout_logprobs
    difference_T = (old_T - rollout_T).abs().masked_fill(~inputs.mask, 0.0)
    return {
        "sampling/logp_difference/mean": _sum(difference_T, inputs.mask),
        "sampling/logp_difference/max": difference_T.amax(),
        "sampling/kl": _sum(k3(log_ratio(old_T, rollout_T, inputs.mask)), inputs.mask),
    }


def _sum(values_T: Tensor, mask_T: Tensor) -> Tensor:
    # float64, so that how tokens are split over micro-batches and ranks does not show.
    return values_T.detach().masked_fill(~mask_T, 0).sum(dtype=torch.float64)
