"""Penalties on tokens that a sequence already has, as the rollout engine applies them.

The logits of a position depend on the tokens before it, so these are needed beside the logits. With
`z` a logit and `n` how often the completion has the token so far:

    z -> z / repetition_penalty if z > 0 else z * repetition_penalty   (prompt or completion has it)
    z -> z - frequency_penalty * n - presence_penalty * [n > 0]

This is vLLM's order: first the repetition penalty (arXiv:1909.05858, section 4.1), then the two of
OpenAI's API, all before the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlsys.algo.batching import PackedMicroBatch
from rlsys.algo.sampling import Sampling, VocabSlice


@dataclass(frozen=True, slots=True)
class History:
    """The tokens before each of T positions of a packed micro-batch of M tokens."""

    token_ids_M: Tensor
    """[M] int64"""
    is_sampled_M: Tensor
    """[M] bool, True where the token belongs to a completion, False in prompts."""
    starts_T: Tensor
    """[T] int64, where the sequence of each position starts."""
    positions_T: Tensor
    """[T] int64, the position: the last token that its prediction has seen."""

    @classmethod
    def of(cls, micro_batch: PackedMicroBatch, positions_T: Tensor) -> History:
        """The history of some positions of a micro-batch.

        Tokens of completions are those that are trained on. A completion that is not trained on
        counts as a prompt: nothing reads its log-probs.
        """
        return cls(
            token_ids_M=micro_batch.input_ids,
            is_sampled_M=pad(micro_batch.loss_mask[:-1], (1, 0)),
            starts_T=positions_T - micro_batch.position_ids[positions_T],
            positions_T=positions_T,
        )

    def rows(self, rows: slice) -> History:
        """The history of some of the positions."""
        return History(
            self.token_ids_M, self.is_sampled_M, self.starts_T[rows], self.positions_T[rows]
        )


def penalize_(
    logits_TV: Tensor, history: History, sampling: Sampling, vocab: VocabSlice
) -> Tensor | None:
    """Apply the penalties of `sampling`, in place.

    Args:
        logits_TV: [T, V] of this rank's slice of the vocabulary.
        history: of these T positions.
        sampling: the penalties.
        vocab: this rank's slice.

    Returns:
        [T, V] d penalized / d logit, which only the repetition penalty changes; None without it.
    """
    size = logits_TV.shape[1]
    longest = int((history.positions_T - history.starts_T).max()) + 1
    index_TS = history.starts_T[:, None] + torch.arange(longest, device=logits_TV.device)
    is_before_TS = index_TS <= history.positions_T[:, None]
    index_TS = index_TS.clamp(max=len(history.token_ids_M) - 1)
    columns_TS = history.token_ids_M[index_TS] - vocab.start
    is_before_TS &= (columns_TS >= 0) & (columns_TS < size)
    # One more column takes what is not before the position, or belongs to another rank's slice.
    columns_TS = columns_TS.masked_fill(~is_before_TS, size)
    factor_TV = None
    if sampling.repetition_penalty != 1.0:
        has_TV = torch.zeros(len(logits_TV), size + 1, dtype=torch.bool, device=logits_TV.device)
        has_TV = has_TV.scatter_(1, columns_TS, True)[:, :size]
        factor_TV = torch.ones_like(logits_TV)
        factor_TV.masked_fill_(has_TV & (logits_TV > 0), 1 / sampling.repetition_penalty)
        factor_TV.masked_fill_(has_TV & (logits_TV <= 0), sampling.repetition_penalty)
        logits_TV.mul_(factor_TV)
    if sampling.frequency_penalty or sampling.presence_penalty:
        sampled_TS = columns_TS.masked_fill(~history.is_sampled_M[index_TS], size)
        counts_TV = logits_TV.new_zeros(len(logits_TV), size + 1, dtype=torch.float32)
        counts_TV.scatter_add_(1, sampled_TS, torch.ones_like(sampled_TS, dtype=torch.float32))
        counts_TV = counts_TV[:, :size]
        logits_TV.sub_(sampling.frequency_penalty * counts_TV)
        logits_TV.sub_(sampling.presence_penalty * (counts_TV > 0))
    return factor_TV
