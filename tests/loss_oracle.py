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


def epsilons(config):
    low, high = config.epsilon_low, config.epsilon_high
    return config.epsilon if low is None else low, config.epsilon if high is None else high


def clipped(ratio, row, config, delta=None):
    low, high = epsilons(config)
    objective = minimum(ratio * row.A, ratio.clamp(1 - low, 1 + high) * row.A)
    if delta is not None:  # dual clip: for A < 0 never below delta * A
        objective = torch.where(row.A < 0, torch.maximum(objective, delta * row.A), objective)
    return -objective


def token_ratio(row):
    return (row.logprobs - row.old).exp()


def sequence_ratio(row):
    return (row.logprobs - row.old).mean().exp().expand(row.logprobs.shape)


def at_level(row, config):
    return sequence_ratio(row) if config.importance_sampling_level else token_ratio(row)


def grpo(row, config):
    return clipped(at_level(row, config), row, config, config.delta)


def dual_clip(row, config):
    return clipped(at_level(row, config), row, config, config.delta or 3.0)


def gspo(row, config):
    return clipped(sequence_ratio(row), row, config, config.delta)


def cispo(row, config):
    _, high = epsilons(config)
    weight = minimum(at_level(row, config).detach(), torch.tensor(1 + high))
    if config.epsilon_low is not None:
        weight = torch.maximum(weight, torch.tensor(1 - config.epsilon_low))
    return -weight * row.A * row.logprobs


def gmpo(row, config):
    low, high = epsilons(config)
    product = torch.ones((), dtype=torch.float64)
    for log_ratio, advantage in zip(row.logprobs - row.old, row.A, strict=True):
        if advantage > 0:
            product = product * log_ratio.clamp(max=high).exp()
        else:
            product = product * log_ratio.clamp(min=-low).exp()
    return -row.A * product ** (1 / len(row.A))


def vespo(row, config):
    """With the correction, which is a part of w."""
    w = (row.logprobs - row.old).detach().sum().exp() * correction(row, config).prod()
    k, decay = config.vespo_k_neg, config.vespo_lambda_neg
    if row.A[0] >= 0:
        k, decay = config.vespo_k_pos, config.vespo_lambda_pos
    return -(w**k) * (decay * (1 - w)).exp() * row.A * row.logprobs


def dppo(row, config, divergence):
    low, high = epsilons(config)
    now, old = row.logprobs.detach().exp(), row.old.exp()
    loss = []
    for i, advantage in enumerate(row.A):
        up = bool(now[i] > old[i])
        far = divergence(now[i], old[i]) > (high if up else low)
        weight = min(float(now[i] / old[i]), config.delta or 20)
        loss.append(0 * row.logprobs[i] if far and up == (advantage > 0) else -weight * advantage)
    return torch.stack([torch.as_tensor(value) for value in loss]).detach() * row.logprobs


def total_variation(p, q):
    return ((p - q).abs() + ((1 - p) - (1 - q)).abs()) / 2


def binary_kl(p, q):
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()


def kl_cov(row, config):
    return -token_ratio(row) * row.A


def sapo(row, config):
    positive = 4 / config.sapo_temperature_pos, config.sapo_temperature_pos
    other = 4 / config.sapo_temperature_neg, config.sapo_temperature_neg
    scale, tau = positive if row.A[0] > 0 else other
    return -scale / (1 + torch.exp(-tau * (at_level(row, config) - 1))) * row.A


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
    "gmpo": gmpo,
    "vespo": vespo,
    "dppo_tv": lambda row, config: dppo(row, config, total_variation),
    "dppo_kl": lambda row, config: dppo(row, config, binary_kl),
    "clip_cov": grpo,
    "kl_cov": kl_cov,
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
    level = config.rollout_is.split("_")[0]
    if level in levels:
        upper, lower = config.rollout_is_threshold, config.rollout_is_threshold_lower or 0
        raw = levels[level]
        weight = raw.clamp(lower, upper)
        if config.rollout_is.endswith("mask"):
            weight = torch.where((raw < lower) | (raw > upper), 0.0, weight)
    if config.rollout_rs in levels:
        value, upper = levels[config.rollout_rs], config.rollout_rs_threshold or 2.0
        lower = config.rollout_rs_threshold_lower
        lower = 1 / upper if lower is None else lower
        weight = torch.where((value < lower) | (value > upper), 0.0, weight)
    elif config.rollout_rs != "none":
        value = log_w**2 / 2 if config.rollout_rs.endswith("k2") else log_w.exp() - 1 - log_w
        if config.rollout_rs.startswith("seq"):
            value = getattr(value, config.rollout_rs.split("_")[1])() * torch.ones_like(log_w)
        weight = torch.where(value > config.rollout_rs_threshold, 0.0, weight)
    veto = config.rollout_token_veto_threshold
    if veto is not None and (log_w.exp() < veto).any():
        weight = torch.zeros_like(weight)
    veto = config.rollout_token_veto_threshold_high
    if veto is not None and (log_w.exp() > veto).any():
        weight = torch.zeros_like(weight)
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
    if config.rollout_is not in ("auto", "none"):
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
        losses = TOKEN_LOSSES[name](row, config)
        if name != "vespo":
            losses = correction(row, config) * losses
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
