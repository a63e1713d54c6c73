"""What of an optimizer step is not finite: loss, log-probs, and the numbers that the loss reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from rlsys.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.algo.batching import PackedMicroBatch
    from rlsys.types import TrainBatch

PREFIX = "nonfinite/"
"""Of the keys of `count_nonfinite`; `MetricSums` reports them as sums."""
PER_TOKEN = ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")
"""Fields of a TrainBatch and of a PackedMicroBatch with a number for each token."""

KINDS = ("loss", "gradient", "logprobs", "scores", *PER_TOKEN)
"""What can be not finite in an optimizer step."""


def count_nonfinite(
    packed: PackedMicroBatch, logprobs_T: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    """Statistics of a micro-batch: how many of its trained tokens have a NaN or an infinity where.

    A gradient does not show all of them. The bound of a log ratio has the gradient 0, so a NaN of
    the reference, or a log-prob of -inf, would change nothing but the metrics.

    Args:
        packed: the micro-batch.
        logprobs_T: [T] the policy's log-probs of its targets.
        loss: of the micro-batch; it counts as one value.
    """
    values = {name: getattr(packed, name) for name in PER_TOKEN}
    present = {name: value for name, value in values.items() if value is not None}
    present["logprobs"] = logprobs_T.detach()
    stacked_KT = torch.stack([value.float() for value in present.values()])
    counts_K = (~stacked_KT.isfinite() & packed.loss_mask).sum(dim=1)
    counts = {PREFIX + name: count for name, count in zip(present, counts_K, strict=True)}
    return {PREFIX + "loss": ~loss.detach().isfinite()} | counts


def nonfinite_entries(batch: TrainBatch, name: str) -> list[tuple[int, int, float]]:
    """(row, token, value) of the trained tokens whose field `name` of the batch is not finite."""
    values_NS = getattr(batch, name)
    if values_NS is None:
        return []
    found = (~values_NS.isfinite() & batch.completion_mask).nonzero().tolist()
    return [(row, token, values_NS[row, token].item()) for row, token in found]


def found_text(found: Mapping[str, int]) -> str:
    """What was not finite, by KINDS, for people: "loss, gradient, 3 values of advantages"."""
    names = {"logprobs": "the policy's log-probs"}
    return ", ".join(
        kind
        if kind in ("loss", "gradient")
        else f"{counted(count, 'value')} of {names.get(kind, kind)}"
        for kind, count in found.items()
    )
