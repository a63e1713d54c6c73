"""Advantages: how much better each completion is than the others.

An estimator reads an `AdvantageInput` and the `grpo` section of the config, and returns [N, S], one
advantage for each token. It sees a whole rollout: only here are completions compared.

Example: an estimator of your own, in one function

    @register_advantage_estimator("plain")
    def plain(inputs, config):
        return inputs.over_tokens(inputs.rewards_PG)

Everything is computed in float64. A completion whose reward is NaN is dropped: no mean and no std
includes it, and `compute_advantages` gives it 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlsys.algo.kl import KL_ESTIMATORS, log_ratio
from rlsys.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config import GrpoConfig
    from rlsys.types import RolloutGroup, TrainBatch


@dataclass(frozen=True, slots=True)
class AdvantageInput:
    """One rollout: P groups of G completions, N = P * G rows of S tokens."""

    rewards_PG: Tensor
    """[P, G] float64, total rewards."""
    by_name_PGF: Tensor
    """[P, G, F] float64, rewards of each function; NaN where it does not apply."""
    weights_F: Tensor
    """[F] float64"""
    kl_NS: Tensor
    """[N, S] float64, cost of each token: `beta * KL` with `kl_in_reward`, else 0."""
    mask_NS: Tensor
    """[N, S] bool, sampled tokens."""

    @property
    def penalized_PG(self) -> Tensor:
        """[P, G] rewards minus the KL of the completion's tokens."""
        return self.rewards_PG - self.kl_NS.sum(dim=1).view_as(self.rewards_PG)

    @property
    def dropped_N1(self) -> Tensor:
        """[N, 1] bool, completions without a reward."""
        return self.rewards_PG.isnan().reshape(-1, 1)

    def over_tokens(self, advantages_PG: Tensor) -> Tensor:
        """[P, G] -> [N, S]: every token of a completion has its completion's advantage."""
        return advantages_PG.reshape(-1, 1) * self.mask_NS


MAXRL_EPS = 1e-6
"""Added to the mean that maxrl divides by, as in its authors' code."""

AdvantageEstimator = Callable[[AdvantageInput, "GrpoConfig"], "Tensor"]

advantage_estimators: Registry[AdvantageEstimator] = Registry("advantage estimator")
register_advantage_estimator = advantage_estimators.register


@register_advantage_estimator("grpo")
def group_relative(inputs: AdvantageInput, config: GrpoConfig) -> Tensor:
    """`A = (r - mean of the group) / (std + advantage_eps)`.

    DeepSeekMath (arXiv:2402.03300), section 4.1.2. The std is unbiased (torch's), over the group;
    with `scale_rewards` over the batch, or left out: Dr. GRPO (arXiv:2503.20783), section 3.2.
    """
    if config.multi_objective_aggregation == "normalize_then_sum":
        return inputs.over_tokens(decoupled_normalization(inputs, config.advantage_eps))
    rewards_PG = inputs.penalized_PG
    advantages_PG = rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True)
    return inputs.over_tokens(_scaled(advantages_PG, rewards_PG, config, default="group"))


def decoupled_normalization(inputs: AdvantageInput, eps: float) -> Tensor:
    """Each reward function normalized within its group, then summed: GDPO (arXiv:2601.05242).

    `A_f = (r_f - mean of the group) / (std of the group + eps)`; their weighted sum is normalized
    over the batch. So rewards of different size and spread stay distinguishable after the sum.

    Returns:
        [P, G] float64.
    """
    # A dropped completion counts nowhere, whatever some functions gave it.
    dropped_PG1 = inputs.rewards_PG.isnan()[..., None]
    rewards_PGF = inputs.by_name_PGF.masked_fill(dropped_PG1, torch.nan)
    each_PGF = rewards_PGF - rewards_PGF.nanmean(dim=1, keepdim=True)
    each_PGF = each_PGF / (nanstd(rewards_PGF, dim=1) + eps)
    sum_PG = (each_PGF * inputs.weights_F).nansum(dim=2)
    sum_PG = sum_PG.masked_fill(inputs.rewards_PG.isnan(), torch.nan)
    return (sum_PG - sum_PG.nanmean()) / (nanstd(sum_PG) + eps)


@register_advantage_estimator("rloo")
def leave_one_out(inputs: AdvantageInput, config: GrpoConfig) -> Tensor:
    """`A_i = r_i - mean of the other r_j of the group`, RLOO (arXiv:2402.14740), section 3.2.

    Equal to `G / (G - 1) * (r_i - mean of the group)`; divided by a std only if `scale_rewards` is
    set.
    """
    rewards_PG = inputs.penalized_PG
    kept_P1 = (~rewards_PG.isnan()).sum(dim=1, keepdim=True)
    # A completion whose siblings were all dropped equals its own mean: 0, whatever it is scaled by.
    factor_P1 = kept_P1 / (kept_P1 - 1).clamp(min=1)
    advantages_PG = factor_P1 * (rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True))
    return inputs.over_tokens(_scaled(advantages_PG, rewards_PG, config, default="none"))


@register_advantage_estimator("reinforce_plus_plus")
def reinforce_plus_plus(inputs: AdvantageInput, config: GrpoConfig) -> Tensor:
    """`A_t = r - sum of beta KL_i over i >= t`, whitened: REINFORCE++ (arXiv:2501.03262).

    Whitened over all tokens of the batch, without a baseline of the group.
    """
    return _whitened(inputs.over_tokens(inputs.rewards_PG) - _to_go(inputs.kl_NS), inputs, config)


@register_advantage_estimator("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(inputs: AdvantageInput, config: GrpoConfig) -> Tensor:
    """`A = r - mean of the group`, whitened over all tokens: REINFORCE++ (arXiv:2501.03262).

    A KL in the reward is charged to the tokens before it, as by `reinforce_plus_plus`.
    """
    centered_PG = inputs.rewards_PG - inputs.rewards_PG.nanmean(dim=1, keepdim=True)
    return _whitened(inputs.over_tokens(centered_PG) - _to_go(inputs.kl_NS), inputs, config)


@register_advantage_estimator("maxrl")
def maximum_likelihood(inputs: AdvantageInput, config: GrpoConfig) -> Tensor:
    """`A = (r - mean of the group) / (mean of the group + 1e-6)`: MaxRL (arXiv:2602.02710).

    With rewards of 0 and 1 its expectation is the gradient of log p(solved) instead of p(solved),
    to the order that G completions allow: prompts that are seldom solved count more.
    """
    rewards_PG = inputs.rewards_PG
    means_P1 = rewards_PG.nanmean(dim=1, keepdim=True)
    if (rewards_PG < 0).any():
        raise ValueError(
            "grpo.advantage_estimator = maxrl divides by the mean reward of a group, so rewards "
            f"must be 0 or more, and one is {rewards_PG.nan_to_num(torch.inf).min():g}: shift it, "
            "or use advantage_estimator grpo"
        )
    return inputs.over_tokens((rewards_PG - means_P1) / (means_P1 + MAXRL_EPS))


def nanstd(values: Tensor, dim: int | None = None) -> Tensor:
    """Unbiased std of the values that are not NaN, 0 for fewer than two; `dim` keeps size 1."""
    dims = tuple(range(values.ndim)) if dim is None else (dim,)
    count = (~values.isnan()).sum(dim=dims, keepdim=True)
    difference = values - values.nanmean(dim=dims, keepdim=True)
    return (difference.square().nansum(dim=dims, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _scaled(advantages_PG: Tensor, rewards_PG: Tensor, config: GrpoConfig, default: str) -> Tensor:
    scale = default if config.scale_rewards == "auto" else config.scale_rewards
    if scale == "none":
        return advantages_PG
    std = nanstd(rewards_PG, dim=1 if scale == "group" else None)
    return advantages_PG / (std + config.advantage_eps)


def _to_go(values_NS: Tensor) -> Tensor:
    """[N, S] sums over each token and all tokens after it."""
    return values_NS.flip(1).cumsum(1).flip(1)


def _whitened(advantages_NS: Tensor, inputs: AdvantageInput, config: GrpoConfig) -> Tensor:
    """Advantages of mean 0 and std 1 over the tokens of the batch."""
    kept_NS = inputs.mask_NS & ~inputs.dropped_N1
    values = advantages_NS[kept_NS]
    scaled_NS = (advantages_NS - values.mean()) / (nanstd(values) + config.advantage_eps)
    return scaled_NS.masked_fill(~kept_NS, 0.0)


def rewards_matrix(groups: list[RolloutGroup]) -> Tensor:
    """[P, G] float64 total rewards of scored groups; NaN is a dropped completion."""
    return torch.tensor(
        [[reward.total for reward in group.rewards] for group in groups], dtype=torch.float64
    )


def compute_advantages(
    groups: list[RolloutGroup],
    batch: TrainBatch,
    config: GrpoConfig,
    reward_weights: Sequence[float] | None,
) -> Tensor:
    """[N, S] float32 advantages of all tokens, by the estimator of the config; 0 where masked.

    Args:
        groups: P scored groups of G completions.
        batch: built from them; with a KL in the reward, with ref_logprobs and old_logprobs; for
            on-policy distillation with teacher_logprobs.
        config: names the estimator.
        reward_weights: one for each reward function, in the order of `by_name`; None is 1 each.
    """
    mask_NS = batch.completion_mask
    kl_NS = torch.zeros(mask_NS.shape, dtype=torch.float64)
    if config.kl_in_reward and batch.ref_logprobs is not None:
        assert batch.old_logprobs is not None, "Config.recompute_old_logprobs is for this, too"
        x_NS = log_ratio(batch.ref_logprobs.double(), batch.old_logprobs.double(), mask_NS)
        kl_NS = config.beta * KL_ESTIMATORS[config.kl_estimator or "k1"](x_NS)
    advantages_NS = _estimate(groups, mask_NS, kl_NS, config, reward_weights)
    if batch.teacher_logprobs is None:
        return advantages_NS
    return advantages_NS + (config.opd_kl_coef * teacher_log_ratio(batch)).float()


def teacher_log_ratio(batch: TrainBatch) -> Tensor:
    """[N, S] float64 log-probs of the teacher minus the policy's, 0 where masked.

    The mean of its negative is KL(policy || teacher) of the tokens that the policy sampled. Without
    `old_logprobs` the policy has not moved since, and the rollout engine's log-probs are its own.
    """
    assert batch.teacher_logprobs is not None
    own_NS = batch.rollout_logprobs if batch.old_logprobs is None else batch.old_logprobs
    return log_ratio(batch.teacher_logprobs.double(), own_NS.double(), batch.completion_mask)


def advantages_of_group(
    group: RolloutGroup, config: GrpoConfig, reward_weights: Sequence[float] | None
) -> list[float] | None:
    """[G] advantages of one group; None if they depend on the rest of the batch or on log-probs."""
    looks_at_group_only = (
        config.advantage_estimator in ("grpo", "rloo", "maxrl")
        and config.scale_rewards != "batch"
        and config.multi_objective_aggregation == "sum_then_normalize"
        and not config.advantages_need_logprobs
    )
    if not looks_at_group_only:
        return None
    # Every token of a completion has the same advantage, so one token each is enough.
    mask_G1 = torch.ones(len(group.completions), 1, dtype=torch.bool)
    kl_G1 = torch.zeros(mask_G1.shape, dtype=torch.float64)
    return _estimate([group], mask_G1, kl_G1, config, reward_weights)[:, 0].tolist()


def _estimate(
    groups: list[RolloutGroup],
    mask_NS: Tensor,
    kl_NS: Tensor,
    config: GrpoConfig,
    reward_weights: Sequence[float] | None,
) -> Tensor:
    rewards_PG = rewards_matrix(groups)
    assert rewards_PG.shape[1] >= 2, "the config has rollout.num_generations >= 2"
    names = list(groups[0].rewards[0].by_name)
    by_name = [[[r.by_name[name] for name in names] for r in g.rewards] for g in groups]
    inputs = AdvantageInput(
        rewards_PG=rewards_PG,
        by_name_PGF=torch.tensor(by_name, dtype=torch.float64),
        weights_F=torch.tensor(reward_weights or [1.0] * len(names), dtype=torch.float64),
        kl_NS=kl_NS,
        mask_NS=mask_NS,
    )
    estimate = advantage_estimators[config.advantage_estimator]
    # A NaN elsewhere is a fault, which the policy finds.
    return estimate(inputs, config).masked_fill(inputs.dropped_N1, 0.0).float()
