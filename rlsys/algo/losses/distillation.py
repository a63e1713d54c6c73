"""The loss of distillation: the divergence from the teacher, which the model's end computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.algo.losses.base import LossInput, token_statistics, weighted_sum
from rlsys.algo.segments import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


def gkd_loss(inputs: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """The divergence of student and teacher at each token, GKD (arXiv:2306.13649).

    See `rlsys.algo.divergence`, which computes it. Reports the entropies of both, and how often the
    token that came is the student's first choice.
    """
    assert inputs.divergence is not None, "the batch came without a teacher"
    assert inputs.teacher_entropy is not None
    assert inputs.is_likeliest is not None
    loss = weighted_sum(inputs, inputs.divergence)
    return loss, token_statistics(inputs, loss) | {
        "teacher_entropy": masked_sum(inputs.teacher_entropy, inputs.mask),
        "mean_token_accuracy": masked_sum(inputs.is_likeliest, inputs.mask),
    }
