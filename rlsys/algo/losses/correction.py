"""Off-policy correction: completions were sampled from the rollout engine, not from old_logprobs.

Engine and trainer round differently, and with stale weights they differ outright. The surrogate's
expectation is then corrected by the weight `w = old policy / rollout engine` of what was sampled:
PPO decoupled into a behaviour and a proximal policy (arXiv:2110.00641, arXiv:2505.24298). `w` is
truncated (`rollout_is`) or its completion or token is left out (`rollout_rs`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlsys.algo.kl import MAX_LOG_RATIO, log_ratio
from rlsys.algo.segments import masked_sum

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.algo.losses.base import LossInput
    from rlsys.config import GrpoConfig


@torch.no_grad()
def correction_weights(
    inputs: LossInput, config: GrpoConfig
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """[T] constants that the policy's token losses are multiplied by; None for 1 everywhere.

    Denominators do not change: a token that is left out still counts, so that micro-batches and
    ranks need not know each other's.
    """
    truncate, reject = config.rollout_is, config.rollout_rs
    if (
        truncate in ("auto", "none")
        and reject == "none"
        and config.off_policy_mask_threshold is None
    ):
        return None, {}
    mask_T = inputs.mask
    log_w_T = log_ratio(inputs.old_logprobs, inputs.rollout_logprobs, mask_T)
    weights_T = torch.ones_like(log_w_T)
    clipped_T = torch.zeros_like(mask_T)
    if truncate not in ("auto", "none"):
        raw_T = _at_level(log_w_T, truncate, inputs)
        weights_T = raw_T.clamp(max=config.rollout_is_threshold)
        clipped_T = raw_T > config.rollout_is_threshold
    kept_T = _accepted(log_w_T, inputs, config) & _not_off_policy(inputs, config)
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
    """w of the token, of the sequence (their product), or its geometric mean over tokens."""
    if level == "sequence":
        log_w_T = inputs.segments.sums(log_w_T, inputs.mask)
    elif level == "geometric":
        log_w_T = inputs.segments.means(log_w_T, inputs.mask)
    return log_w_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _accepted(log_w_T: Tensor, inputs: LossInput, config: GrpoConfig) -> Tensor:
    """Where lower <= w <= upper: IcePop (arXiv:2510.18855) at the token level."""
    if config.rollout_rs == "none":
        return torch.ones_like(inputs.mask)
    upper, lower = config.rollout_rs_threshold, config.rollout_rs_threshold_lower
    w_T = _at_level(log_w_T, config.rollout_rs, inputs)
    return (w_T <= upper) & (w_T >= (1 / upper if lower is None else lower))


def _not_off_policy(inputs: LossInput, config: GrpoConfig) -> Tensor:
    """DeepSeek-V3.2 (arXiv:2512.02556), equation 9: bad completions that went out of sight go.

    That is, those with a negative advantage whose log-probs fell by more than the threshold on
    average since they were sampled.
    """
    if config.off_policy_mask_threshold is None:
        return torch.ones_like(inputs.mask)
    fallen_T = log_ratio(inputs.rollout_logprobs, inputs.logprobs, inputs.mask)
    mean_T = inputs.segments.means(fallen_T, inputs.mask)
    return (inputs.advantages >= 0) | (mean_T <= config.off_policy_mask_threshold)
