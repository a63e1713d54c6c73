"""What a step logs of each reward function; docs/metrics.md explains every key."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsys.types import RewardOutput, RolloutGroup

FAILURE_KEYS = {"timeout": "timeouts", "crashed": "crashes", "error": "errors"}
"""How each `RewardFailure` is counted, as rewards/<name>/<key>."""


def reward_metrics(groups: list[RolloutGroup]) -> dict[str, float]:
    """Mean and spread of each reward function, how they go together, and what failed.

    NaN values, of functions that do not apply, are left out, as in TRL.

    Args:
        groups: P scored groups.
    """
    rewards = [reward for group in groups for reward in group.rewards]
    names = list(rewards[0].by_name) if rewards else []
    metrics: dict[str, float] = {}
    for name in names:
        per_group = [_values(group.rewards, name) for group in groups]
        metrics |= _spread(f"rewards/{name}", [value for values in per_group for value in values])
        metrics |= _within_groups(f"rewards/{name}", per_group)
    for one, other in combinations(names, 2):
        correlation = _correlation(rewards, one, other)
        if correlation is not None:
            metrics[f"rewards/correlation/{one}/{other}"] = correlation
    return metrics | _failure_counts(rewards)


def logged_metrics(groups: list[RolloutGroup], beside: Collection[str]) -> dict[str, float]:
    """Means of what the reward functions logged themselves (`log_metric`).

    Args:
        groups: P scored groups.
        beside: names that are taken: a metric of such a name is `logged/<name>`.
    """
    logged = [reward.metrics for group in groups for reward in group.rewards]
    names = dict.fromkeys(name for metrics in logged for name in metrics)
    means = {name: statistics.fmean(m[name] for m in logged if name in m) for name in names}
    return {f"logged/{n}" if n in beside else n: value for n, value in means.items()}


def _values(rewards: Sequence[RewardOutput], name: str) -> list[float]:
    """Those that are not NaN."""
    values = (reward.by_name[name] for reward in rewards)
    return [value for value in values if not math.isnan(value)]


def _spread(prefix: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {f"{prefix}/mean": statistics.fmean(values), f"{prefix}/std": std}


def _within_groups(prefix: str, per_group: list[list[float]]) -> dict[str, float]:
    stds = [statistics.stdev(values) for values in per_group if len(values) > 1]
    if not stds:
        return {}
    return {
        f"{prefix}/group_std": statistics.fmean(stds),
        f"{prefix}/frac_zero_std": sum(std < 1e-8 for std in stds) / len(stds),
    }


def _correlation(rewards: list[RewardOutput], one: str, other: str) -> float | None:
    """Pearson's, over the completions where both apply; None where one of them is constant."""
    pairs = [
        pair
        for reward in rewards
        if not any(map(math.isnan, pair := (reward.by_name[one], reward.by_name[other])))
    ]
    if len(pairs) < 2:
        return None
    xs, ys = zip(*pairs, strict=True)
    if min(xs) == max(xs) or min(ys) == max(ys):
        return None
    return statistics.correlation(xs, ys)


def _failure_counts(rewards: list[RewardOutput]) -> dict[str, float]:
    counts = Counter(_failures(rewards))
    return {
        f"rewards/{name}/{FAILURE_KEYS[kind]}": float(count)
        for (name, kind), count in counts.items()
    }


def _failures(rewards: list[RewardOutput]) -> Iterator[tuple[str, str]]:
    for reward in rewards:
        yield from reward.failures.items()
