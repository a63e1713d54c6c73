"""The clipped surrogate, of which most loss names are presets, and the geometric mean of ratios."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlsys.algo.kl import log_ratio
from rlsys.algo.losses.base import (
    LossInput,
    clip_statistics,
    importance_ratio,
    policy_loss,
    ratio_statistics,
    register_loss,
)
from rlsys.algo.segments import masked_sum
from rlsys.config.algorithm import CLIPPED_LOSSES

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config import GrpoConfig


def clipped_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t)`.

    PPO (arXiv:1707.06347), equation 7; DeepSeekMath (arXiv:2402.03300), equation 3; DAPO
    (arXiv:2503.14476), section 3.1, has two epsilons. `config.loss_settings` says how token losses
    are averaged, and

    - what r is the ratio of: with "sequence" GSPO (arXiv:2507.18071), equations 5 and 7, and
      LUSPO (arXiv:2602.05261);
    - delta: for A < 0 the loss is at most -delta A, dual clip (arXiv:1912.09729), where it is c.

    clip_cov leaves the tokens out that `weighting.tokens_of_high_covariance` chose: Clip-Cov
    (arXiv:2505.22617).
    """
    if inputs.high_covariance is not None:
        kept_T = inputs.advantages.masked_fill(inputs.high_covariance, 0.0)
        inputs = replace(inputs, advantages=kept_T)
    (low, high), delta = config.clip_range, config.loss_settings.delta
    advantages_T, ratio_T = inputs.advantages, importance_ratio(inputs, config)
    # With delta > high it bounds only tokens of negative advantage: TRL's is dual clip's.
    bounded_T = ratio_T if delta is None else ratio_T.clamp(max=delta)
    surrogate_T = (bounded_T * advantages_T).min(ratio_T.clamp(low, high) * advantages_T)
    # Where min() takes the clipped term: there the token has no policy gradient.
    low_clipped_T = (ratio_T < low) & (advantages_T < 0)
    high_clipped_T = (ratio_T > high) & (advantages_T > 0)
    statistics = clip_statistics(inputs, low_clipped_T, high_clipped_T)
    if delta is not None:
        dual_T = (ratio_T > delta) & (advantages_T < 0)
        statistics["clip_ratio/dual_mean"] = masked_sum(dual_T, inputs.mask)
    statistics |= ratio_statistics(inputs, ratio_T)
    return policy_loss(inputs, config, -surrogate_T, statistics)


for _name in CLIPPED_LOSSES:
    register_loss(_name)(clipped_loss)


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
