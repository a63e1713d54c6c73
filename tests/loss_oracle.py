"""Every loss as its paper writes it: one completion after the other, in float64, without masks.

Nothing here is shared with rlsys.algo.losses.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlsys.config import GrpoConfig
from rlsys.types import TrainBatch


def minimum(a, b):
    return torch.minimum(a, b)


def clipped(ratio, row, config, delta=None):
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    objective = minimum(ratio * row.A, ratio.clamp(1 - config.epsilon, 1 + high) * row.A)
    if delta is not None:  # dual clip: for A < 0 never below delta * A
        objective = torch.where(row.A < 0, torch.maximum(objective, delta * row.A), objective)
    return -objective


def token_ratio(row):
    return (row.logprobs - row.old).exp()


def sequence_ratio(row):
    return (row.logprobs - row.old).mean().exp().expand(row.logprobs.shape)


def grpo(row, config):
    return clipped(token_ratio(row), row, config, config.delta)


def dual_clip(row, config):
    return clipped(token_ratio(row), row, config, config.delta or 3.0)


def gspo(row, config):
    return clipped(sequence_ratio(row), row, config, config.delta)


def cispo(row, config):
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    weight = minimum(token_ratio(row).detach(), torch.tensor(1 + high))
    return -weight * row.A * row.logprobs


def sapo(row, config):
    positive = 4 / config.sapo_temperature_pos, config.sapo_temperature_pos
    other = 4 / config.sapo_temperature_neg, config.sapo_temperature_neg
    scale, tau = positive if row.A[0] > 0 else other
    return -scale / (1 + torch.exp(-tau * (token_ratio(row) - 1))) * row.A


def reinforce(row, config):
    return -row.A * row.logprobs


TOKEN_LOSSES = {
    "grpo": grpo,
    "bnpo": grpo,
    "dapo": grpo,
    "dr_grpo": grpo,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "luspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
}


def correction(row, config):
    """Truncated weights, 0 where rejected."""
    log_w = (row.old - row.rollout).detach()
    levels = {
        "token": log_w.exp(),
        "sequence": log_w.sum().exp() * torch.ones_like(log_w),
        "geometric": log_w.mean().exp() * torch.ones_like(log_w),
    }
    weight = torch.ones_like(log_w)
    if config.rollout_is in levels:
        weight = minimum(levels[config.rollout_is], torch.tensor(config.rollout_is_threshold))
    if config.rollout_rs != "none":
        value, upper = levels[config.rollout_rs], config.rollout_rs_threshold
        lower = config.rollout_rs_threshold_lower
        lower = 1 / upper if lower is None else lower
        weight = torch.where((value < lower) | (value > upper), 0.0, weight)
    if config.off_policy_mask_threshold is not None:
        fallen = (row.rollout - row.logprobs).mean().item()
        if row.A[0] < 0 and fallen > config.off_policy_mask_threshold:
            weight = torch.zeros_like(weight)
    return weight


def kl(row, config):
    difference = row.logprobs - row.ref
    estimates = {
        "k1": difference,
        "k2": 0.5 * difference**2,
        "k3": (-difference).exp() - 1 + difference,
    }
    estimate = estimates[config.kl_estimator or "k3"]
    if not config.use_bias_correction_kl:
        return estimate
    if config.rollout_is in ("token", "sequence"):
        return (row.logprobs - row.rollout).exp() * estimate
    return token_ratio(row) * estimate


def oracle_loss(
    name: str,
    batch: TrainBatch,
    logprobs_NS,
    entropies_NS,
    rows,
    config: GrpoConfig,
    *,
    aggregation: str,
    max_completion_length: int,
):
    """The loss of one optimizer step on `rows`, differentiable."""
    sums, lengths = [], []
    for n in rows:
        if batch.kept is not None and not batch.kept[n]:
            continue
        mask = batch.completion_mask[n]
        fields = {
            "logprobs": logprobs_NS,
            "old": batch.old_logprobs,
            "ref": batch.ref_logprobs,
            "rollout": batch.rollout_logprobs,
            "A": batch.advantages,
            "entropy": entropies_NS,
        }
        row = SimpleNamespace(**{k: v[n][mask].double() for k, v in fields.items()})
        lengths.append(len(row.A))
        if not len(row.A):
            sums.append(torch.zeros((), dtype=torch.float64))
            continue
        losses = correction(row, config) * TOKEN_LOSSES[name](row, config)
        if not config.kl_in_reward:
            losses = losses + config.beta * kl(row, config)
        losses = losses - config.entropy_coef * row.entropy
        sums.append(losses.sum())
    if aggregation == "token_mean":
        return sum(sums) / sum(lengths)
    if aggregation == "seq_mean_token_mean":
        return sum(s / max(n, 1) for s, n in zip(sums, lengths, strict=True)) / len(sums)
    if aggregation == "seq_mean_token_sum":
        return sum(sums) / len(sums)
    assert aggregation == "seq_mean_token_sum_norm"
    return sum(sums) / (len(sums) * max_completion_length)
