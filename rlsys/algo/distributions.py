"""Distributions over a vocabulary that may be split, and those of a teacher's likeliest tokens.

What `rlsys.algo.divergence` is computed from. [T, V] logits are of this rank's slice of the
vocabulary, and of a few tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from rlsys.algo.logprobs import NO_PROBABILITY
from rlsys.algo.sampling import WHOLE_VOCABULARY, VocabSlice, fused

CHUNK_TOKENS = 256
"""Tokens whose logits, of student and teacher, exist at once: a quarter of what log-probs take,
because several float32 tensors of this size live at the same time."""
LARGEST_LOG_SUM = -1e-7
"""Bound of the log of the likeliest tokens' probability, so that the others have some; TRL's."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence is computed."""

    beta: float = 0.5
    """From 0, the forward KL, to 1, the reverse KL."""
    temperature: float = 1.0
    """Divides both logits."""
    num_token_ids: int | None = None
    """Ids from here on are left out of both distributions; None: none are."""


class TeacherTop(NamedTuple):
    """The likeliest tokens of the teacher."""

    ids_TK: Tensor
    """int64"""
    logprobs_TK: Tensor
    """float32, at the divergence's temperature, over the teacher's whole vocabulary."""


def chunks_of(length: int, size: int) -> Iterator[slice]:
    """Slices of `size`, and a shorter one at the end."""
    return (slice(start, start + size) for start in range(0, length, size))


def logits_of(
    hidden_TH: Tensor, weight_VH: Tensor, divergence: Divergence, vocab: VocabSlice
) -> Tensor:
    """[T, V] of this rank's slice, -inf for ids that are left out."""
    logits_TV = linear(hidden_TH, weight_VH)
    if divergence.num_token_ids is not None:
        logits_TV[:, max(0, divergence.num_token_ids - vocab.start) :] = -torch.inf
    return logits_TV


def norms(logits_TV: Tensor, temperature: float, vocab: VocabSlice) -> tuple[Tensor, Tensor]:
    """[T] greatest logit / temperature of the whole vocabulary, and log sum of exp."""
    max_T, sum_T = fused(_max_and_sum, logits_TV, temperature)
    if vocab.group is not None:
        own_T = max_T.clone()
        vocab.all_reduce_(max_T, dist.ReduceOp.MAX)
        sum_T = (own_T - max_T).clamp(min=NO_PROBABILITY).exp() * sum_T
        vocab.all_reduce_(sum_T, dist.ReduceOp.SUM)
    return max_T, max_T + sum_T.log()


def _max_and_sum(logits_TV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    lowest = torch.finfo(torch.float32).min
    z_TV = logits_TV.to(wide) / temperature
    # Also where all ids of a slice are left out.
    max_T = z_TV.amax(dim=-1).clamp(min=lowest)
    return max_T, (z_TV - max_T[:, None]).clamp(min=lowest).exp().sum(dim=-1)


def log_probs(logits_TV: Tensor, log_norm_T: Tensor, temperature: float) -> Tensor:
    """[T, V] log-probs, at least NO_PROBABILITY."""
    log_TV = logits_TV.to(log_norm_T.dtype) / temperature - log_norm_T[:, None]
    return log_TV.clamp(min=NO_PROBABILITY)  # 0 * -inf = nan


def log_mixture(log_p_TV: Tensor, log_q_TV: Tensor, beta: float) -> Tensor:
    """`log((1 - beta) p + beta q)`."""
    return torch.logaddexp(log_p_TV + math.log1p(-beta), log_q_TV + math.log(beta))


def top_divergence(log_p_TK: Tensor, log_q_TK: Tensor, beta: float) -> Tensor:
    """[T] divergence over K tokens and the rest, with gradient by the student's log-probs."""
    log_p_TK, log_q_TK = with_rest(log_p_TK), with_rest(log_q_TK)
    p_TK, q_TK = log_p_TK.exp(), log_q_TK.exp()
    if beta == 0:
        return (q_TK * (log_q_TK - log_p_TK)).sum(-1)
    if beta == 1:
        return (p_TK * (log_p_TK - log_q_TK)).sum(-1)
    log_m_TK = log_mixture(log_p_TK, log_q_TK, beta)
    of_teacher_T = (q_TK * (log_q_TK - log_m_TK)).sum(-1)
    return beta * of_teacher_T + (1 - beta) * (p_TK * (log_p_TK - log_m_TK)).sum(-1)


def with_rest(logprobs_TK: Tensor) -> Tensor:
    """[T, K + 1]: the last one is of all other tokens together."""
    log_sum_T1 = logprobs_TK.logsumexp(dim=-1, keepdim=True).clamp(max=LARGEST_LOG_SUM)
    return torch.cat([logprobs_TK, (-torch.expm1(log_sum_T1)).log()], dim=-1)


def entropy_with_rest(logprobs_TK: Tensor) -> Tensor:
    """[T] entropy over K tokens and the rest."""
    log_TK = with_rest(logprobs_TK)
    return -(log_TK.exp() * log_TK).sum(-1)


def teacher_top(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    k: int,
    *,
    divergence: Divergence,
    vocab: VocabSlice = WHOLE_VOCABULARY,
    chunk_size: int = CHUNK_TOKENS,
) -> TeacherTop:
    """The teacher's k likeliest tokens, computed where the teacher is; without gradient.

    Args:
        hidden_TD, weight_VD: the teacher's, as those of the student in `chunked_divergence`.
        k: at most the number of its tokens.
    """
    ids: list[Tensor] = [torch.zeros(0, k, dtype=torch.int64, device=hidden_TD.device)]
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    logprobs: list[Tensor] = [hidden_TD.new_zeros(0, k, dtype=wide)]
    for chunk in chunks_of(len(hidden_TD), chunk_size):
        logits_TV = logits_of(hidden_TD[chunk], weight_VD, divergence, vocab)
        _, log_norm_T = norms(logits_TV, divergence.temperature, vocab)
        top_TK, columns_TK = logits_TV.topk(min(k, logits_TV.shape[1]))
        own_ids_TK = columns_TK + vocab.start
        if vocab.group is not None:
            top_TK, own_ids_TK = (_gather_columns(one, vocab) for one in (top_TK, own_ids_TK))
            top_TK, places_TK = top_TK.topk(k)
            own_ids_TK = own_ids_TK.gather(-1, places_TK)
        ids.append(own_ids_TK)
        logprobs.append(log_probs(top_TK, log_norm_T, divergence.temperature))
    return TeacherTop(torch.cat(ids), torch.cat(logprobs))


def _gather_columns(values_TK: Tensor, vocab: VocabSlice) -> Tensor:
    assert vocab.group is not None
    parts = [torch.empty_like(values_TK) for _ in range(vocab.group.size())]
    dist.all_gather(parts, values_TK.contiguous(), group=vocab.group)
    return torch.cat(parts, dim=1)
