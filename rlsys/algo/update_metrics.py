"""What an update logs; docs/metrics.md explains every key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.algo.finite import PREFIX as NONFINITE

TOTALS = ("loss", "num_loss_tokens", "nll_loss")
"""Statistics that are reported as sums, not divided by the number of tokens."""
MEANS_OF_ANSWERS = {
    "rewards/chosen": "num_chosen",
    "rewards/rejected": "num_rejected",
    "rewards/accuracies": "num_chosen",
    "logps/chosen": "num_chosen",
    "logps/rejected": "num_rejected",
    "log_odds_ratio": "num_chosen",
    "log_odds_chosen": "num_chosen",
}
"""Statistics of preference training -> the statistic that they are divided by."""

SAMPLING_DIFFERENCES = (
    "sampling/logp_difference/mean",
    "sampling/logp_difference/max",
    "sampling/kl",
)
"""How trainer and rollout engine differ."""


class MetricSums:
    """Statistics of one optimizer step, the same however it is split into micro-batches and ranks.

    A key says how its values combine:

    - ending in /max or /min: the extreme over all micro-batches and ranks;
    - `loss`, `num_loss_tokens`, `nll_loss`, and counts of what is not finite: the sum;
    - a mean over answers: the sum divided by the number of answers, see `MEANS_OF_ANSWERS`;
    - anything else: the sum divided by `num_loss_tokens`, a mean over tokens. A mean that ends in
      /square_mean is reported as `<name>/effective_sample_size`, the square of `<name>/mean`
      divided by it.

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
        """Maxima, and negated minima."""

    def add(self, of_micro_batch: Mapping[str, Tensor]) -> None:
        """Adds the statistics of one micro-batch: scalars, all on one device."""
        for key, value in of_micro_batch.items():
            value = value.detach().double()
            if key.endswith(("/max", "/min")):
                value = -value if key.endswith("/min") else value
                self._maxima[key] = torch.maximum(self._maxima.get(key, value), value)
            else:
                self._sums[key] = self._sums.get(key, 0.0) + value

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        """Combines the ranks of `group` (None: all ranks), in two collectives.

        Every rank must have added the same keys: one micro-batch or more of the same loss.
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
        metrics: dict[str, float] = {}
        for key, value in self._sums.items():
            number = num_tokens
            if key in TOTALS or key.startswith(NONFINITE):
                number = 1
            elif key in MEANS_OF_ANSWERS:
                number = self._sums[MEANS_OF_ANSWERS[key]].item()
            if key not in MEANS_OF_ANSWERS.values() and number > 0:
                metrics[key] = value.item() / number
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        for key in [key for key in metrics if key.endswith("/square_mean")]:
            # Kish's effective sample size, as a share of the tokens: 1 when all weigh the same.
            mean, square = metrics[key.replace("/square_mean", "/mean")], metrics.pop(key)
            share = mean**2 / square if square else 0.0
            metrics[key.replace("/square_mean", "/effective_sample_size")] = share
        for key, value in self._maxima.items():
            metrics[key] = -value.item() if key.endswith("/min") else value.item()
        return metrics


def reduced_means(
    micro_batches: Iterable[Mapping[str, Tensor]], group: dist.ProcessGroup | None
) -> dict[str, float]:
    """The metrics of an optimizer step, from the statistics of this rank's micro-batches."""
    sums = MetricSums()
    for statistics in micro_batches:
        sums.add(statistics)
    sums.all_reduce(group)
    return sums.means()


def combine_optimizer_steps(
    steps: list[dict[str, float]], *, sampling_of_first: bool = False
) -> dict[str, float]:
    """The metrics of an update from its optimizer steps' metrics, which have equal keys.

    Means over the steps, except: extremes (/min, /max), the sum of `num_loss_tokens`, the last
    `learning_rate`. Adds `clip_ratio/low_min` and `clip_ratio/high_max`, the extremes of the clip
    ratios over the steps. TRL takes them over sequences and devices; over optimizer steps they do
    not depend on how a step is split. If no step had tokens to train on, `num_loss_tokens` is all.

    Args:
        steps: the metrics of each optimizer step.
        sampling_of_first: whether the difference of trainer and engine is that of the first step
            alone, because it was measured with the policy of each step, which has moved since.
    """
    if not steps:
        return {"num_loss_tokens": 0.0}
    combined = {key: _combine(key, [step[key] for step in steps]) for key in steps[0]}
    if sampling_of_first:
        combined |= {key: steps[0][key] for key in SAMPLING_DIFFERENCES if key in steps[0]}
    if "clip_ratio/low_mean" in combined:
        combined["clip_ratio/low_min"] = min(step["clip_ratio/low_mean"] for step in steps)
        combined["clip_ratio/high_max"] = max(step["clip_ratio/high_mean"] for step in steps)
    return combined


def _combine(key: str, values: list[float]) -> float:
    if key.endswith("/max"):
        return max(values)
    if key.endswith("/min"):
        return min(values)
    if key == "num_loss_tokens":
        return sum(values)
    return values[-1] if key == "learning_rate" else sum(values) / len(values)
