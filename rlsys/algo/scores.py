"""Losses of the scores of whole sequences: rewards of pairs, classes, and numbers.

B rows of a micro-batch have [B, L] scores, with L outputs of the head. In pairs, rows 2 i and
2 i + 1 are a chosen and a rejected answer. A unit is a pair, or a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from rlsys.algo.update_metrics import MetricSums
from rlsys.types import TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config.reward_model import RewardModelSection
    from rlsys.types import ScoredRow

_NAMES = {"reward/min": "min_reward", "reward/max": "max_reward"}
"""Of statistics that combine as extremes -> TRL's names of the metrics."""


class Pairs(NamedTuple):
    """Rewards of P pairs."""

    chosen_P: Tensor
    rejected_P: Tensor
    margin_P: Tensor
    """How much the chosen one should be above the rejected one; 0 where rows have no margin."""

    @classmethod
    def of(cls, scores_BL: Tensor, labels_BL: Tensor) -> Pairs:
        """From rows of which each pair follows the other; both have the pair's margin as label."""
        return cls(scores_BL[0::2, 0], scores_BL[1::2, 0], labels_BL[0::2, 0])


def preference_losses(pairs: Pairs, *, center: float | None = None) -> Tensor:
    """[P] Bradley-Terry: `-log sigmoid(chosen - rejected - margin)`, the mean of which is TRL's.

    The margin is that of Llama 2 (arXiv:2307.09288, equation 2), `center` weighs the square of
    chosen + rejected (arXiv:2312.09244, equation 2).
    """
    losses_P = -F.logsigmoid(pairs.chosen_P - pairs.rejected_P - pairs.margin_P)
    if center is not None:
        losses_P = losses_P + center * (pairs.chosen_P + pairs.rejected_P).square()
    return losses_P


def label_losses(scores_BL: Tensor, labels_BL: Tensor, problem_type: str) -> Tensor:
    """[B] transformers' loss of each row, for its problem_type; the mean over rows is its own."""
    if problem_type == "single_label_classification":
        return F.cross_entropy(scores_BL, labels_BL[:, 0].long(), reduction="none")
    if problem_type == "multi_label_classification":
        of_labels = F.binary_cross_entropy_with_logits(scores_BL, labels_BL, reduction="none")
    else:
        of_labels = (scores_BL - labels_BL).square()
    return of_labels.mean(dim=1)


def score_loss(
    scores_BL: Tensor, labels_BL: Tensor, weights_B: Tensor, section: RewardModelSection
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, and its statistics; see `rlsys.algo.losses.base`.

    Args:
        scores_BL: with gradient.
        labels_BL: float32; of pairs their margins.
        weights_B: of rows, which are 1 / rows of the optimizer step.
        section: says what is learned.
    """
    if section.problem_type == "preference":
        pairs = Pairs.of(scores_BL, labels_BL)
        losses = preference_losses(pairs, center=section.center_rewards_coefficient)
        weights = weights_B[0::2] + weights_B[1::2]
        statistics = _pair_statistics(pairs)
    else:
        losses = label_losses(scores_BL, labels_BL, section.problem_type)
        weights = weights_B
        statistics = _label_statistics(scores_BL.detach(), labels_BL, section.problem_type)
    loss = (losses * weights).sum()
    statistics["loss"] = loss.detach().double()
    # What means are divided by; `named` gives it its name.
    statistics["num_loss_tokens"] = torch.tensor(float(len(losses)), device=losses.device).double()
    return loss, statistics


def _pair_statistics(pairs: Pairs) -> dict[str, Tensor]:
    """TRL's metrics, as sums over pairs."""
    chosen_P, rejected_P = (rewards.detach().double() for rewards in pairs[:2])
    infinite = chosen_P.new_full((1,), torch.inf)  # of no pairs, which fill up a schedule
    return {
        "accuracy": (chosen_P > rejected_P).double().sum(),
        "margin": (chosen_P - rejected_P).sum(),
        "mean_reward": ((chosen_P + rejected_P) / 2).sum(),
        "reward/min": torch.cat([chosen_P, rejected_P, infinite]).amin(),
        "reward/max": torch.cat([chosen_P, rejected_P, -infinite]).amax(),
    }


def _label_statistics(scores_BL: Tensor, labels_BL: Tensor, problem_type: str) -> dict[str, Tensor]:
    """Sums over rows: how many are right in all labels, or how far numbers are off."""
    if problem_type == "single_label_classification":
        return {"accuracy": (scores_BL.argmax(1) == labels_BL[:, 0].long()).double().sum()}
    if problem_type == "multi_label_classification":
        is_right_BL = (scores_BL > 0) == (labels_BL > 0.5)
        return {
            "accuracy": is_right_BL.all(1).double().sum(),
            "label_accuracy": is_right_BL.double().mean(1).sum(),
        }
    return {"mae": (scores_BL - labels_BL).abs().double().mean(1).sum()}


def named(metrics: dict[str, float], section: RewardModelSection) -> dict[str, float]:
    """Metrics of an update by TRL's names."""
    count = "num_pairs" if section.problem_type == "preference" else "num_rows"
    names = {**_NAMES, "num_loss_tokens": count}
    return {names.get(key, key): value for key, value in metrics.items()}


def score_metrics(
    scored: Sequence[tuple[Tensor, Tensor]], section: RewardModelSection
) -> dict[str, float]:
    """Metrics of held-out rows, from (scores, labels) [N, L] of batches of whole units."""
    scores_NL, labels_NL = (torch.cat(part) for part in zip(*scored, strict=True))
    weights_N = torch.full((len(scores_NL),), 1.0 / len(scores_NL))
    _, statistics = score_loss(scores_NL, labels_NL, weights_N, section)
    sums = MetricSums()
    sums.add(statistics)
    return named(sums.means(), section)


def build_score_batch(rows: Sequence[ScoredRow], *, at_least: int = 1) -> TrainBatch:
    """Right-padded texts of rows, in their order; their last tokens are what is trained on.

    With fewer rows than `at_least`, such as data-parallel ranks, units of nothing follow.
    """
    texts = [text for row in rows for text in row.texts]
    together, num_labels = len(rows[0].texts), len(rows[0].label)
    lengths = [len(text) for text in texts]
    lengths += [1] * together * (at_least - len(rows))
    shape = (len(lengths), max(lengths))
    input_ids = torch.zeros(shape, dtype=torch.int64)  # `pack` drops the padding again
    is_last = torch.zeros(shape, dtype=torch.bool)
    for n, text in enumerate(texts):
        input_ids[n, : len(text)] = torch.from_numpy(text)
        is_last[n, len(text) - 1] = True
    labels = torch.zeros(len(lengths), num_labels)
    labels[: len(texts)] = torch.tensor([row.label for row in rows for _ in row.texts])
    nothing = torch.zeros(1, 1).expand(shape)  # one number in memory: no text was rewarded
    return TrainBatch(
        input_ids=input_ids,
        lengths=torch.tensor(lengths),
        completion_mask=is_last,
        advantages=nothing,
        rollout_logprobs=nothing,
        labels=labels,
    )
