"""Losses and measures of the routers in a mixture of experts.

**E** experts, **K** of them for each token. The losses are computed layer by layer, from the tokens
that this rank routes, and summed over layers and ranks by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

BalancingLevel = Literal["aux_loss", "seq_aux_loss"]
"""megatron-core's moe_router_load_balancing_type: tokens that a loss compares. aux_loss: all of a
micro-batch; seq_aux_loss: all of each row."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of tokens within which experts are balanced, of one micro-batch."""

    ids_T: Tensor
    """[T] int64, the group of each token."""
    is_token_T: Tensor
    """[T] bool, tokens that count: no filling, and no row that trains nothing."""
    lengths_B: Tensor
    """[B] int64, tokens of each group that count, on all ranks that share the micro-batch."""
    shares_B: Tensor
    """[B] float32, the group's share of the optimizer step: all its groups' shares sum to 1."""

    @classmethod
    def of_micro_batch(
        cls,
        sequences_T: Tensor,
        is_token_T: Tensor,
        num_sequences: int,
        level: BalancingLevel,
        *,
        step_tokens: int,
        step_rows: int,
    ) -> Groups:
        """Groups of a whole micro-batch.

        A micro-batch counts by its tokens, a row as much as any other row.

        Args:
            sequences_T: [T] int64, the sequence of each token.
            is_token_T: [T] bool, tokens that count.
            num_sequences: sequences in the micro-batch, its filling included.
            level: see `BalancingLevel`.
            step_tokens, step_rows: tokens and rows of the optimizer step, on all ranks.
        """
        if level == "aux_loss":
            length = is_token_T.sum()[None]
            return cls(torch.zeros_like(sequences_T), is_token_T, length, length / step_tokens)
        lengths = torch.zeros(num_sequences, dtype=torch.int64, device=sequences_T.device)
        lengths.index_add_(0, sequences_T, is_token_T.long())
        return cls(sequences_T, is_token_T, lengths, (lengths > 0) / step_rows)

    def at(self, own: Tensor) -> Groups:
        """The same groups, and the tokens of one rank at positions `own`."""
        return replace(self, ids_T=self.ids_T[own], is_token_T=self.is_token_T[own])

    def counts(self, chosen_TE: Tensor) -> Tensor:
        """[B, E] float32, the tokens of each group that each expert gets."""
        shape = (len(self.lengths_B), chosen_TE.shape[1])
        counts = torch.zeros(shape, dtype=torch.float32, device=chosen_TE.device)
        return counts.index_add_(0, self.ids_T, (chosen_TE & self.is_token_T[:, None]).float())


def load_balancing_loss(
    scores_TE: Tensor, counts_BE: Tensor, groups: Groups, *, top_k: int
) -> Tensor:
    """E * sum_i f_i P_i of each group, averaged over groups by their shares; 1 where balanced.

    f_i is the share of choices that went to expert i, and has no gradient; P_i is the mean score of
    expert i (Switch Transformer, arXiv:2101.03961, eq. 4-6, for K experts of a token).

    Args:
        scores_TE: [T, E] scores over all experts that sum to 1, of this rank's tokens.
        counts_BE: [B, E] from `Groups.counts`, summed over the ranks that share the micro-batch.
        groups: the groups of these tokens.
        top_k: K.

    Returns:
        this rank's part of the loss, a scalar.
    """
    lengths_B = groups.lengths_B.clamp(min=1)
    frequencies_BE = counts_BE / (lengths_B * top_k)[:, None]
    weights_T = (groups.shares_B / lengths_B)[groups.ids_T] * groups.is_token_T
    values_T = (scores_TE * frequencies_BE[groups.ids_T]).sum(-1)
    return scores_TE.shape[1] * (values_T * weights_T).sum()


def z_loss(logits_TE: Tensor, is_token_T: Tensor, *, step_tokens: int) -> Tensor:
    """The mean over an optimizer step's tokens of (log sum_i exp logit_i)^2.

    ST-MoE (arXiv:2202.08906, eq. 5).

    Args:
        logits_TE: [T, E] of this rank's tokens.
        is_token_T: [T] bool, tokens that count.
        step_tokens: tokens of the optimizer step, on all ranks.

    Returns:
        this rank's part of the loss, a scalar.
    """
    return (logits_TE.float().logsumexp(-1).square() * is_token_T).sum() / step_tokens


def load_metrics(counts_LE: Tensor) -> dict[str, float]:
    """How evenly experts were used.

    Args:
        counts_LE: [layers, E] tokens that each expert got in an optimizer step, on all ranks.
    """
    shares_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
    return {
        "moe/expert_share/min": shares_LE.min().item(),
        "moe/expert_share/max": shares_LE.max().item(),
        "moe/unused_experts": (counts_LE == 0).double().sum(-1).mean().item(),
    }
