"""What a rollout logs of its rewards and lengths; docs/metrics.md explains every key."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from rlsys.algo.advantages import nanstd, rewards_matrix, teacher_log_ratio

if TYPE_CHECKING:
    from rlsys.types import DraftCounts, RewardOutput, RolloutGroup, TrainBatch

FAILURE_KEYS = {"timeout": "timeouts", "crashed": "crashes", "error": "errors"}
"""How each `RewardFailure` is counted, as rewards/<name>/<key>."""


def rollout_metrics(groups: list[RolloutGroup], batch: TrainBatch) -> dict[str, float]:
    """Rewards, advantages and lengths of P scored groups of G completions; names of TRL, ms-swift.

    `batch` has the advantages of their tokens.
    """
    rewards_PG = rewards_matrix(groups)
    # With fewer than two rewards, a group has no std.
    compared_P = (~rewards_PG.isnan()).sum(dim=1) > 1
    std_P = nanstd(rewards_PG[compared_P], dim=1)
    num_tokens_N = batch.completion_mask.sum(dim=1)
    abs_mean_N = batch.advantages.abs().sum(dim=1) / num_tokens_N.clamp(min=1)
    metrics = {
        "reward": rewards_PG.nanmean(),
        "reward_std": std_P.mean(),
        "frac_reward_zero_std": torch.isclose(std_P, torch.zeros_like(std_P)).double().mean(),
        "advantages/abs_mean": abs_mean_N.sum() / (num_tokens_N > 0).sum().clamp(min=1),
        "advantages/abs_max": batch.advantages.abs().max(),
    }
    if batch.teacher_logprobs is not None:
        num_tokens = num_tokens_N.sum().clamp(min=1)
        metrics["opd_reverse_kl"] = -teacher_log_ratio(batch).sum() / num_tokens
    numbers = {name: value.item() for name, value in metrics.items()}
    return numbers | reward_metrics(groups) | length_metrics(groups)


def evaluation_metrics(groups: list[RolloutGroup]) -> dict[str, float]:
    """Rewards and lengths of held-out completions.

    A prompt may have only one, so `reward_std` and `frac_reward_zero_std`, which look within
    groups, are missing.
    """
    mean = {"reward": rewards_matrix(groups).nanmean().item()}
    return mean | reward_metrics(groups) | length_metrics(groups)


def speculation_metrics(counts: DraftCounts) -> dict[str, float]:
    """How many drafted tokens were kept; {} where nothing was drafted."""
    if not counts.num_drafts:
        return {}
    accepted = counts.num_accepted_tokens
    return {
        "rollout/spec_acceptance_rate": accepted / counts.num_draft_tokens,
        "rollout/spec_mean_acceptance_length": 1 + accepted / counts.num_drafts,
    }


def length_metrics(groups: list[RolloutGroup]) -> dict[str, float]:
    """Lengths of completions and prompts, and how many completions were cut."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    clipped = [completion.finish_reason == "length" for completion in completions]
    # TRL's rule: if no completion ended by itself, the three terminated_length are 0.
    ended = [n for n, cut in zip(lengths, clipped, strict=True) if not cut] or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(clipped) / len(clipped),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
        "num_prompt_tokens": float(
            sum(len(group.prompt.token_ids) * len(group.completions) for group in groups)
        ),
        "num_completion_tokens": float(sum(lengths)),
    }


def reward_metrics(groups: list[RolloutGroup]) -> dict[str, float]:
    """Mean and spread of each reward function, their correlations, and what failed.

    NaN values, of functions that do not apply, are left out, as in TRL.
    """
    rewards = [reward for group in groups for reward in group.rewards]
    names = list(rewards[0].by_name) if rewards else []
    metrics: dict[str, float] = {}
    for name in names:
        values = [[reward.by_name[name] for reward in group.rewards] for group in groups]
        metrics |= _spread(f"rewards/{name}", values)
    for one, other in combinations(names, 2):
        correlation = _correlation(rewards, one, other)
        if correlation is not None:
            metrics[f"rewards/correlation/{one}/{other}"] = correlation
    failed = Counter(failure for reward in rewards for failure in reward.failures.items())
    for (name, kind), count in failed.items():
        metrics[f"rewards/{name}/{FAILURE_KEYS[kind]}"] = float(count)
    return metrics


def logged_metrics(groups: list[RolloutGroup], beside: Collection[str]) -> dict[str, float]:
    """Means of what the reward functions logged themselves (`log_metric`).

    A metric whose name is in `beside` becomes `logged/<name>`.
    """
    logged = [reward.metrics for group in groups for reward in group.rewards]
    names = dict.fromkeys(name for metrics in logged for name in metrics)
    means = {name: statistics.fmean(m[name] for m in logged if name in m) for name in names}
    return {f"logged/{n}" if n in beside else n: value for n, value in means.items()}


def _spread(prefix: str, per_group: list[list[float]]) -> dict[str, float]:
    """Mean and std of values over all groups, and their std within groups."""
    per_group = [[value for value in values if not math.isnan(value)] for values in per_group]
    values = [value for values in per_group for value in values]
    if not values:
        return {}
    metrics = {
        f"{prefix}/mean": statistics.fmean(values),
        f"{prefix}/std": statistics.stdev(values) if len(values) > 1 else 0.0,
    }
    stds = [statistics.stdev(values) for values in per_group if len(values) > 1]
    if stds:
        metrics[f"{prefix}/group_std"] = statistics.fmean(stds)
        metrics[f"{prefix}/frac_zero_std"] = sum(std < 1e-8 for std in stds) / len(stds)
    return metrics


def _correlation(rewards: list[RewardOutput], one: str, other: str) -> float | None:
    """Pearson's, over the completions where both apply; None if one of them is constant."""
    pairs = [(reward.by_name[one], reward.by_name[other]) for reward in rewards]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    if any(len(set(values)) < 2 for values in zip(*pairs, strict=True)) or not pairs:
        return None
    return statistics.correlation(*zip(*pairs, strict=True))
