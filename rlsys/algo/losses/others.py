"""Losses without the clipped surrogate: cispo, sapo, reinforce, and sft for a warm start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlsys.algo.losses.base import (
    LossInput,
    policy_loss,
    ratio_statistics,
    register_loss,
    token_statistics,
    weighted_sum,
)
from rlsys.algo.segments import masked_sum

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config import GrpoConfig


@register_loss("cispo")
def cispo_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -sg(min(r_t, 1 + epsilon_high)) A_t log pi_t`: the weight is clipped, not the token.

    CISPO, MiniMax-M1 (arXiv:2506.13585), equations 4 and 5; there too without a lower bound.
    """
    _, high = config.clip_range
    ratio_T = inputs.ratio().detach()
    weights_T = ratio_T.clamp(max=high)
    clipped_T = (ratio_T > high) & (inputs.advantages > 0)
    statistics = {"cispo_clip_ratio": masked_sum(clipped_T, inputs.mask)}
    statistics |= ratio_statistics(inputs, ratio_T)
    token_losses_T = -weights_T * inputs.advantages * inputs.logprobs
    return policy_loss(inputs, config, token_losses_T, statistics)


@register_loss("sapo")
def sapo_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -4 / tau sigmoid(tau (r_t - 1)) A_t`: a soft gate instead of a clip.

    SAPO (arXiv:2511.20347), section 3; tau depends on the sign of the advantage.
    """
    ratio_T = inputs.ratio()
    tau_T = torch.where(
        inputs.advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg
    )
    gate_T = torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T
    statistics = ratio_statistics(inputs, ratio_T)
    return policy_loss(inputs, config, -gate_T * inputs.advantages, statistics)


@register_loss("reinforce")
def reinforce_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_t = -A_t log pi_t`: the policy gradient itself, without a ratio.

    Williams (1992), https://doi.org/10.1007/BF00992696; RLOO (arXiv:2402.14740), section 3.
    """
    return policy_loss(inputs, config, -inputs.advantages * inputs.logprobs)


@register_loss("sft")
def sft_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the completions, for a supervised warm start.

    Of `inputs` it reads logprobs, weights and mask, of `config` nothing.
    """
    loss = weighted_sum(inputs, -inputs.logprobs)
    return loss, token_statistics(inputs, loss)
