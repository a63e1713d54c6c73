"""A score head on the last stage of a model: scores of whole sequences, from their last token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from rlsys.algo.batching import PackedMicroBatch


class Scores(NamedTuple):
    """What the head computes, behind the interface of TokenValues."""

    scores: torch.Tensor
    """[T, num_labels] float32, as if each token were the last of its sequence."""


def put_score_head(model: GPTModel, num_labels: int) -> None:
    """Replace the output head by `model.score`, one row for each label, without values yet.

    It is whole on every tensor-parallel rank: it has a few rows only.
    """
    config = model.config
    del model.output_layer
    model.output_layer = torch.nn.Identity()
    model.score = torch.nn.Linear(
        config.hidden_size,
        num_labels,
        bias=False,
        dtype=config.params_dtype,
        device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
    )
    of_language_model = model.sharded_state_dict

    def sharded_state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        model.post_process = False  # or it would look for the weight of an output head
        try:
            return of_language_model(*args, **kwargs)
        finally:
            model.post_process = True

    model.sharded_state_dict = sharded_state_dict


@torch.no_grad()
def initialize_score(weight: torch.Tensor, *, std: float, seed: int) -> None:
    """The values of a new head, the same on every rank."""
    rng = torch.Generator().manual_seed(seed)
    weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=rng))


class ScoreHead:
    """Scores from the last stage's hidden states.

    Args:
        model: the last pipeline stage.
        in_fp32: whether scores are computed in float32.
    """

    def __init__(self, model: GPTModel, *, in_fp32: bool):
        self._model, self._in_fp32 = model, in_fp32

    def __call__(
        self, hidden: torch.Tensor, micro_batch: PackedMicroBatch, positions: torch.Tensor
    ) -> Scores:
        """[1, T / sp, H] hidden states of T positions -> their scores; sp is as in LogprobHead."""
        hidden, weight = hidden.squeeze(0), self._model.score.weight
        if self._model.config.sequence_parallel:
            # Every rank computes the whole loss: each takes the gradient of its own tokens.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        if self._in_fp32:
            hidden, weight = hidden.float(), weight.float()
        return Scores(F.linear(hidden, weight).float())
