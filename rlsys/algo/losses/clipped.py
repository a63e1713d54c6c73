"""The clipped surrogate: grpo, bnpo, dapo, dr_grpo, dual_clip, clip_cov, gspo, luspo; gmpo."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlsys.algo.kl import log_ratio
from rlsys.algo.losses.base import (
    LossInput,
    clip_statistics,
    covariance_statistics,
    importance_ratio,
    policy_loss,
    ratio_statistics,
    register_loss,
)
from rlsys.algo.names import DEFAULT_DELTA
from rlsys.algo.segments import masked_sum

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config import GrpoConfig


# The four differ in how token losses are averaged, see names.DEFAULT_AGGREGATION.
@register_loss("grpo")
@register_loss("bnpo")
@register_loss("dapo")
@register_loss("dr_grpo")
def clipped_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -min(r_t A_t, clip(r_t, 1 - epsilon, 1 + epsilon_high) A_t)`.

    DeepSeekMath (arXiv:2402.03300), equation 3, from PPO (arXiv:1707.06347), equation 7; DAPO
    (arXiv:2503.14476), section 3.1, lets the upper bound differ from the lower one.
    """
    return _clipped(inputs, config, level="token", delta=config.delta)


@register_loss("dual_clip")
def dual_clip_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO that also bounds the loss of a bad token: `max(min(r A, clip(r) A), delta A)` for A < 0.

    Ye et al. (arXiv:1912.09729), where delta is called c.
    """
    delta = DEFAULT_DELTA["dual_clip"] if config.delta is None else config.delta
    return _clipped(inputs, config, level="token", delta=delta)


@register_loss("clip_cov")
def clip_cov_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate without a few tokens whose covariance drives the entropy down.

    Clip-Cov (arXiv:2505.22617); `weighting.tokens_of_high_covariance` chooses.
    """
    if inputs.high_covariance is not None:
        kept_T = inputs.advantages.masked_fill(inputs.high_covariance, 0.0)
        inputs = replace(inputs, advantages=kept_T)
    return _clipped(inputs, config, level="token", delta=config.delta)


@register_loss("gmpo")
def geometric_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L = -A exp(mean of the sequence's clipped log r_t)`: the geometric mean of clipped ratios.

    GMPO (arXiv:2507.20673). The log ratio of each token is clipped to [-epsilon_low,
    epsilon_high], from above for A > 0 and from below for A < 0.
    """
    low, high = config.epsilons
    sign_T = inputs.advantages.sign()
    log_ratio_T = log_ratio(inputs.logprobs, inputs.old_logprobs, inputs.mask)
    clipped_T = log_ratio_T.clamp(-low, high)
    bounded_T = sign_T * (sign_T * log_ratio_T).min(sign_T * clipped_T)
    ratio_T = inputs.segments.means(bounded_T, inputs.mask).exp()
    low_clipped_T = (log_ratio_T < -low) & (sign_T < 0)
    high_clipped_T = (log_ratio_T > high) & (sign_T > 0)
    statistics = clip_statistics(inputs, low_clipped_T, high_clipped_T)
    statistics |= ratio_statistics(inputs, ratio_T)
    return policy_loss(inputs, config, -ratio_T * inputs.advantages, statistics)


@register_loss("gspo")
@register_loss("luspo")
def sequence_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate of sequences: the ratio of every token is the geometric mean of its sequence.

    GSPO (arXiv:2507.18071), equations 5 and 7; averaged without division by the length LUSPO
    (arXiv:2602.05261).
    """
    return _clipped(inputs, config, level="sequence", delta=config.delta)


def _clipped(
    inputs: LossInput, config: GrpoConfig, *, level: str, delta: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    low, high = config.clip_range
    advantages_T = inputs.advantages
    ratio_T = importance_ratio(inputs, config.importance_sampling_level or level)
    # With delta > high only tokens of negative advantage notice: TRL's bound is dual clip's.
    bounded_T = ratio_T if delta is None else ratio_T.clamp(max=delta)
    surrogate_T = (bounded_T * advantages_T).min(ratio_T.clamp(low, high) * advantages_T)
    # Where min() takes the clipped term: there the token has no policy gradient.
    low_clipped_T = (ratio_T < low) & (advantages_T < 0)
    high_clipped_T = (ratio_T > high) & (advantages_T > 0)
    statistics = clip_statistics(inputs, low_clipped_T, high_clipped_T)
    if delta is not None:
        dual_T = (ratio_T > delta) & (advantages_T < 0)
        statistics["clip_ratio/dual_mean"] = masked_sum(dual_T, inputs.mask)
    statistics |= ratio_statistics(inputs, ratio_T) | covariance_statistics(inputs)
    return policy_loss(inputs, config, -surrogate_T, statistics)
