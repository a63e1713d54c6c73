"""What a rollout and an update log; docs/metrics.md explains every key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from rlsys.algo.advantages import nanstd, rewards_matrix
from rlsys.algo.reward_metrics import reward_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.types import RolloutGroup, TrainBatch

TOTALS = ("loss", "num_loss_tokens")
"""Statistics that are reported as sums, not divided by the number of tokens."""


def rollout_metrics(groups: list[RolloutGroup], batch: TrainBatch) -> dict[str, float]:
    """Rewards and lengths of one rollout, by the names of TRL and ms-swift.

    Args:
        groups: P scored groups of G completions.
        batch: with the advantages of their tokens.
    """
    rewards_PG = rewards_matrix(groups)
    # A group is compared where it has two rewards; where it has fewer, no std is known.
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
    numbers = {name: value.item() for name, value in metrics.items()}
    return numbers | reward_metrics(groups) | _length_metrics(groups)


def evaluation_metrics(groups: list[RolloutGroup]) -> dict[str, float]:
    """Rewards and lengths of held-out completions, of which a prompt may have only one.

    So there is no `reward_std` and no `frac_reward_zero_std`, which look within groups.

    Args:
        groups: P scored groups.
    """
    rewards_PG = rewards_matrix(groups)
    mean = {"reward": rewards_PG.nanmean().item()}
    return mean | reward_metrics(groups) | _length_metrics(groups)


def _length_metrics(groups: list[RolloutGroup]) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    clipped = [completion.finish_reason == "length" for completion in completions]
    # TRL's rule: with no completion that ended by itself, the three terminated_length are 0.
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


class MetricSums:
    """Statistics of one optimizer step, the same however it is split into micro-batches and ranks.

    A key says how its values combine:

    - ending in /max or /min: the extreme over all micro-batches and ranks;
    - `loss`, `num_loss_tokens`: the sum;
    - ending in /square_mean: as the next, and reported with `<name>/mean` as their squared mean by
      the mean of their squares, `<name>/effective_sample_size`;
    - anything else: the sum too, divided by `num_loss_tokens` at the end, a mean over tokens.

    Example:
        sums = MetricSums()
        for micro_batch in ...:
            loss, statistics = loss_function(inputs, config)
            sums.add(statistics)
        sums.all_reduce(data_parallel_group)
        metrics = sums.means()
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        """Minima are kept here with their sign turned."""

    def add(self, of_micro_batch: Mapping[str, Tensor]) -> None:
        """Adds the statistics of one micro-batch: detached scalars on any one device."""
        for key, value in of_micro_batch.items():
            value = value.detach().double()
            if key.endswith(("/max", "/min")):
                value = -value if key.endswith("/min") else value
                before = self._maxima.get(key)
                self._maxima[key] = value if before is None else torch.maximum(before, value)
            else:
                before = self._sums.get(key)
                self._sums[key] = value if before is None else before + value

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        """Combines the ranks of `group` (None: all ranks), in two collectives.

        Every rank must have added the same keys, that is at least one micro-batch of the same loss.
        """
        for values, op in ((self._sums, dist.ReduceOp.SUM), (self._maxima, dist.ReduceOp.MAX)):
            keys = sorted(values)
            if keys:
                flat = torch.stack([values[key] for key in keys])
                dist.all_reduce(flat, op=op, group=group)
                values.update(zip(keys, flat, strict=True))

    def means(self) -> dict[str, float]:
        """The metrics of the optimizer step, as numbers."""
        num_tokens = self._sums["num_loss_tokens"].item()
        assert num_tokens > 0, "a step without tokens to train on is left out"
        metrics = {
            key: value.item() if key in TOTALS else value.item() / num_tokens
            for key, value in self._sums.items()
        }
        for key in [key for key in metrics if key.endswith("/square_mean")]:
            # Kish's effective sample size, as a share of the tokens: 1 when all weigh the same.
            mean, square = metrics[key.replace("/square_mean", "/mean")], metrics.pop(key)
            share = mean**2 / square if square else 0.0
            metrics[key.replace("/square_mean", "/effective_sample_size")] = share
        for key, value in self._maxima.items():
            metrics[key] = -value.item() if key.endswith("/min") else value.item()
        return metrics


def combine_optimizer_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """One line of metrics for the optimizer steps of one rollout, which report the same keys.

    Means over the steps, except: extremes (/min, /max), the sum of `num_loss_tokens`, the last
    `learning_rate`. Adds `clip_ratio/low_min` and `clip_ratio/high_max`, the extremes of the clip
    ratios over the steps. TRL takes them over sequences and devices; over optimizer steps they do
    not depend on how a step is split. Without any step, because none had tokens to train on, there
    is nothing else to report.
    """
    if not steps:
        return {"num_loss_tokens": 0.0}
    combined = {}
    for key in steps[0]:
        values = [step[key] for step in steps]
        if key.endswith("/max"):
            combined[key] = max(values)
        elif key.endswith("/min"):
            combined[key] = min(values)
        elif key == "num_loss_tokens":
            combined[key] = sum(values)
        elif key == "learning_rate":
            combined[key] = values[-1]
        else:
            combined[key] = sum(values) / len(values)
    if "clip_ratio/low_mean" in combined:
        combined["clip_ratio/low_min"] = min(step["clip_ratio/low_mean"] for step in steps)
        combined["clip_ratio/high_max"] = max(step["clip_ratio/high_mean"] for step in steps)
    return combined
