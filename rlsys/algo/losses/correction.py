"""Off-policy correction: completions were sampled from the rollout engine, not from old_logprobs.

Engine and trainer round differently, and with stale weights they differ outright. The weight `w =
old policy / rollout engine` of what was sampled corrects the surrogate's expectation: PPO decoupled
into a behaviour and a proximal policy (arXiv:2110.00641, arXiv:2505.24298). `rollout_is` bounds
`w`, `rollout_rs` leaves tokens or completions out by it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rlsys.algo.kl import KL_ESTIMATORS, MAX_LOG_RATIO, log_ratio
from rlsys.algo.segments import masked_sum

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.algo.losses.base import LossInput
    from rlsys.config import GrpoConfig


@torch.no_grad()
def correction_weights(
    inputs: LossInput, config: GrpoConfig
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """[T] constant factors of the policy's token losses, None if all are 1; and statistics.

    A token that is left out still counts in the denominators, which micro-batches and ranks could
    not know of each other otherwise.
    """
    masks_off_policy = config.off_policy_mask_threshold is not None
    if not (config.corrects_rollouts or config.rejects_rollouts or masks_off_policy):
        return None, {}
    mask_T = inputs.mask
    log_w_T = log_ratio(inputs.old_logprobs, inputs.rollout_logprobs, mask_T)
    weights_T, kept_T = torch.ones_like(log_w_T), torch.ones_like(mask_T)
    clipped_T = torch.zeros_like(mask_T)
    if config.corrects_rollouts:
        level, _, bound = config.rollout_is.partition("_")
        raw_T = _at_level(log_w_T, level, inputs)
        weights_T = raw_T.clamp(config.rollout_is_threshold_lower, config.rollout_is_threshold)
        clipped_T = weights_T != raw_T
        if bound == "mask":
            kept_T = ~clipped_T
    kept_T &= _accepted(log_w_T, inputs, config) & _not_off_policy(inputs, config)
    weights_T = weights_T * kept_T
    statistics = {
        "importance_sampling_ratio/mean": masked_sum(weights_T, mask_T),
        "importance_sampling_ratio/square_mean": masked_sum(weights_T.square(), mask_T),
        "importance_sampling_ratio/min": weights_T.masked_fill(~mask_T, torch.inf).amin(),
        "importance_sampling_ratio/max": weights_T.masked_fill(~mask_T, -torch.inf).amax(),
        "clipped_fraction": masked_sum(clipped_T & kept_T, mask_T),
        "masked_fraction": masked_sum(~kept_T, mask_T),
    }
    return weights_T, {f"sampling/{name}": value for name, value in statistics.items()}


def _at_level(log_w_T: Tensor, level: str, inputs: LossInput) -> Tensor:
    """[T] w of each token, the product over its sequence, or the geometric mean."""
    if level == "sequence":
        log_w_T = inputs.segments.sums(log_w_T, inputs.mask)
    elif level == "geometric":
        log_w_T = inputs.segments.means(log_w_T, inputs.mask)
    return log_w_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _accepted(log_w_T: Tensor, inputs: LossInput, config: GrpoConfig) -> Tensor:
    """[T] bool, the tokens that rollout_rs and the vetoes keep: IcePop (arXiv:2510.18855), verl."""
    kept_T = torch.ones_like(inputs.mask)
    if config.rollout_rs != "none":
        lower, upper = config.rollout_rs_bounds
        w_T = _rejection_statistic(log_w_T, config.rollout_rs, inputs)
        kept_T = (w_T <= upper) & (w_T >= lower)
    low, high = config.rollout_token_veto_threshold, config.rollout_token_veto_threshold_high
    if low is not None:
        least_T = -inputs.segments.maxima(-log_w_T, inputs.mask)
        kept_T = kept_T & (least_T >= math.log(low))
    if high is not None:
        kept_T = kept_T & (inputs.segments.maxima(log_w_T, inputs.mask) <= math.log(high))
    return kept_T


def _rejection_statistic(log_w_T: Tensor, name: str, inputs: LossInput) -> Tensor:
    """[T] what rollout_rs bounds: the weight, or a divergence of rollout engine and policy."""
    *over, estimator = name.split("_")
    if not over:
        return _at_level(log_w_T, name, inputs)
    divergence_T = KL_ESTIMATORS[estimator](log_w_T)
    if over == ["token"]:
        return divergence_T
    segments = inputs.segments
    reduce = {"sum": segments.sums, "mean": segments.means, "max": segments.maxima}[over[1]]
    return reduce(divergence_T, inputs.mask)


def _not_off_policy(inputs: LossInput, config: GrpoConfig) -> Tensor:
    """[T] bool, the off-policy mask: DeepSeek-V3.2 (arXiv:2512.02556), equation 9.

    Drops completions of negative advantage whose mean log-prob fell by more than the threshold
    since sampling.
    """
    if config.off_policy_mask_threshold is None:
        return torch.ones_like(inputs.mask)
    fallen_T = log_ratio(inputs.rollout_logprobs, inputs.logprobs, inputs.mask)
    mean_T = inputs.segments.means(fallen_T, inputs.mask)
    return (inputs.advantages >= 0) | (mean_T <= config.off_policy_mask_threshold)
