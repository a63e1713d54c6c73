"""Losses without the clipped surrogate; sft is for a warm start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rlsys.algo.kl import MAX_LOG_RATIO, log_ratio
from rlsys.algo.losses.base import (
    LossInput,
    clip_statistics,
    importance_ratio,
    policy_loss,
    ratio_statistics,
    register_loss,
    token_statistics,
    weighted_sum,
)
from rlsys.algo.losses.correction import correction_weights
from rlsys.algo.segments import masked_sum

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config import GrpoConfig


VESPO_LEAST_WEIGHT = 1e-8
"""Lower bound of vespo's weights, because it takes their logs."""


@register_loss("cispo")
def cispo_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -sg(clip(r_t)) A_t log pi_t`: the weight is clipped, not the token.

    CISPO, MiniMax-M1 (arXiv:2506.13585), equations 4 and 5; only `epsilon_low` sets a lower bound.
    """
    low, high = config.clip_range
    ratio_T = importance_ratio(inputs, config).detach()
    weights_T = ratio_T.clamp(None if config.epsilon_low is None else low, high)
    clipped_T = (ratio_T > high) & (inputs.advantages > 0)
    statistics = {"cispo_clip_ratio": masked_sum(clipped_T, inputs.mask)}
    if config.epsilon_low is not None:
        statistics["cispo_clip_ratio_low"] = masked_sum(ratio_T < low, inputs.mask)
    statistics |= ratio_statistics(inputs, ratio_T)
    token_losses_T = -weights_T * inputs.advantages * inputs.logprobs
    return policy_loss(inputs, config, token_losses_T, statistics)


@register_loss("sapo")
def sapo_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -4 / tau sigmoid(tau (r_t - 1)) A_t`: a soft gate instead of a clip.

    SAPO (arXiv:2511.20347), section 3; tau depends on the sign of the advantage.
    """
    ratio_T = importance_ratio(inputs, config)
    tau_T = torch.where(
        inputs.advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg
    )
    gate_T = torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T
    statistics = ratio_statistics(inputs, ratio_T)
    return policy_loss(inputs, config, -gate_T * inputs.advantages, statistics)


@register_loss("vespo")
def vespo_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -sg(phi(w)) A_t log pi_t`, `phi(w) = w^k exp(lambda (1 - w))`, w of the sequence.

    VESPO (arXiv:2602.10693): a smooth weight, 1 at w = 1, that goes to 0 both ways; k and lambda
    depend on the sign of the advantage. w is the product of the sequence's ratios; with
    `rollout_is` they are ratios to the rollout engine.
    """
    mask_T, good_T = inputs.mask, inputs.advantages >= 0
    weights_T, _ = correction_weights(inputs, config)
    log_w_T = log_ratio(inputs.logprobs, inputs.old_logprobs, mask_T).detach()
    if weights_T is not None:
        log_w_T = log_w_T + weights_T.clamp(min=VESPO_LEAST_WEIGHT).log()
    least = math.log(VESPO_LEAST_WEIGHT)
    log_w_T = inputs.segments.sums(log_w_T, mask_T).clamp(least, MAX_LOG_RATIO)
    k_T = torch.where(good_T, config.vespo_k_pos, config.vespo_k_neg)
    lambda_T = torch.where(good_T, config.vespo_lambda_pos, config.vespo_lambda_neg)
    log_phi_T = k_T * log_w_T + lambda_T * (1 - log_w_T.exp())
    phi_T = log_phi_T.clamp(max=MAX_LOG_RATIO).exp()  # a lambda near 0 bounds nothing
    if weights_T is not None:
        phi_T = phi_T * (weights_T > 0)
    statistics = ratio_statistics(inputs, log_w_T.exp())
    statistics["vespo_weight/mean"] = masked_sum(phi_T, mask_T)
    token_losses_T = -phi_T * inputs.advantages * inputs.logprobs
    return policy_loss(inputs, config, token_losses_T, statistics, corrected=True)


@register_loss("dppo_tv")
def dppo_tv_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """DPPO with binary total variation `|pi - pi_old|` (arXiv:2602.04879)."""
    moved_T = inputs.logprobs.detach().exp() - inputs.old_logprobs.exp()
    return _divergence_bounded(inputs, config, moved_T, moved_T.abs())


@register_loss("dppo_kl")
def dppo_kl_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """DPPO with `KL(pi_old || pi)` of "this token or another" (arXiv:2602.04879)."""
    logprobs_T, old_T = inputs.logprobs.detach(), inputs.old_logprobs
    p_T, old_p_T = logprobs_T.exp(), old_T.exp()
    tiny = 1e-8  # keeps log(1 - p) finite for a certain token, which rounding may put above 1
    rest_T, old_rest_T = (1 - p_T).clamp(min=0), (1 - old_p_T).clamp(min=0)
    of_rest_T = old_rest_T * ((old_rest_T + tiny) / (rest_T + tiny)).log()
    kl_T = old_p_T * (old_T - logprobs_T) + of_rest_T
    return _divergence_bounded(inputs, config, p_T - old_p_T, kl_T)


def _divergence_bounded(
    inputs: LossInput, config: GrpoConfig, moved_T: Tensor, divergence_T: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -sg(min(r_t, delta)) A_t log pi_t`, 0 for a token that moved too far already.

    Too far is a divergence above epsilon in the direction of the advantage.
    """
    (low, high), delta = config.epsilons, config.loss_settings.delta
    assert delta is not None  # the presets have one
    ratio_T, good_T = inputs.ratio().detach(), inputs.advantages > 0
    high_clipped_T = good_T & (moved_T > 0) & (divergence_T > high)
    low_clipped_T = ~good_T & (moved_T < 0) & (divergence_T > low)
    kept_T = ~(low_clipped_T | high_clipped_T)
    statistics = clip_statistics(inputs, low_clipped_T, high_clipped_T)
    statistics["clip_ratio/dual_mean"] = masked_sum((ratio_T > delta) & kept_T, inputs.mask)
    statistics |= ratio_statistics(inputs, ratio_T)
    weights_T = ratio_T.clamp(max=delta) * kept_T
    token_losses_T = -weights_T * inputs.advantages * inputs.logprobs
    return policy_loss(inputs, config, token_losses_T, statistics)


@register_loss("kl_cov")
def kl_cov_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -r_t A_t`, plus `ppo_kl_coef |log r_t|` for tokens of the highest covariance.

    KL-Cov (arXiv:2505.22617); `weighting.tokens_of_high_covariance` chooses.
    """
    ratio_T = inputs.ratio()
    token_losses_T = -ratio_T * inputs.advantages
    if inputs.high_covariance is not None:
        penalty_T = log_ratio(inputs.logprobs, inputs.old_logprobs, inputs.high_covariance).abs()
        token_losses_T = token_losses_T + config.ppo_kl_coef * penalty_T
    return policy_loss(inputs, config, token_losses_T, ratio_statistics(inputs, ratio_T))


@register_loss("reinforce")
def reinforce_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -A_t log pi_t`: the policy gradient itself, without a ratio.

    Williams (1992), https://doi.org/10.1007/BF00992696; RLOO (arXiv:2402.14740), section 3.
    """
    return policy_loss(inputs, config, -inputs.advantages * inputs.logprobs)


@register_loss("sft")
def sft_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the completions, for a supervised warm start.

    Reads only logprobs, weights and mask. Reports which share of the completions' tokens is the
    policy's first choice, too.
    """
    loss = weighted_sum(inputs, -inputs.logprobs)
    statistics = token_statistics(inputs, loss)
    if inputs.is_likeliest is not None:
        statistics["mean_token_accuracy"] = masked_sum(inputs.is_likeliest, inputs.mask)
    return loss, statistics
