"""Divergence between student and teacher at each token, over a vocabulary that may be split.

The generalised Jensen-Shannon divergence of GKD (arXiv:2306.13649, section 3). With p the student's
and q the teacher's distribution, softmax(logits / temperature), and `m = (1 - beta) p + beta q`:

    beta 0           KL(q || p), the forward KL
    0 < beta < 1     beta KL(q || m) + (1 - beta) KL(p || m)
    beta 1           KL(p || q), the reverse KL

as in TRL. Where the student's logits are z, the gradients are

    beta 0           p - q
    0 < beta < 1     (1 - beta) p (log p - log m - KL(p || m))
    beta 1           p (log p - log q - KL(p || q))

each divided by the temperature. So forward keeps two norms and a sum for each token, and backward
needs no communication: with a `VocabSlice`, each rank has the gradient of its own logits.

The teacher's logits come from its last hidden states and its output weight, chunk by chunk, as the
student's do. Or only the log-probs of its likeliest tokens are known: then all other tokens are one
outcome, whose probability is 1 minus the others' (TRL's `loss_top_k` with `loss_add_tail`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.algo.distributions import (
    CHUNK_TOKENS,
    Divergence,
    TeacherTop,
    chunks_of,
    entropy_with_rest,
    log_mixture,
    log_probs,
    logits_of,
    norms,
    top_divergence,
)
from rlsys.algo.logprobs import NO_PROBABILITY, TokenValues, plus_product
from rlsys.algo.sampling import WHOLE_VOCABULARY, VocabSlice, fused


class TeacherHidden(NamedTuple):
    """The teacher's logits, as a product."""

    hidden_TD: Tensor
    """Its last hidden states, after the last norm."""
    weight_VD: Tensor
    """This rank's slice of its output layer: the token ids of the student's slice."""


class _Rows(NamedTuple):
    """What the forward pass knows of every row."""

    log_norm_T: Tensor
    """Of the student, log sum_v exp(z_v / temperature)."""
    teacher_log_norm_T: Tensor
    """Of the teacher; 0 for a TeacherTop."""
    inner_T: Tensor
    """What the gradient subtracts: KL(p || m), or the reverse KL."""


def chunked_divergence(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    teacher: TeacherHidden | TeacherTop,
    *,
    divergence: Divergence,
    vocab: VocabSlice = WHOLE_VOCABULARY,
    chunk_size: int = CHUNK_TOKENS,
) -> TokenValues:
    """The divergence of each token, and what else is reported of it.

    Args:
        hidden_TH: [T, H] the student's, the same on every rank that shares the vocabulary; T may be
            0.
        weight_VH: [V, H], this rank's slice of the student's output layer.
        targets_T: [T] int64, the tokens that came, for their log-probs.
        teacher: at the same T tokens.
        divergence: says which.
        vocab: this rank's slice of the vocabulary.
        chunk_size: tokens whose logits exist at once.

    Returns:
        float32 (float64 for float64 logits), of which only `divergence` has a gradient: that of
        `hidden_TH` is this rank's share, as in `chunked_token_values`.
    """
    values = _ChunkedDivergence.apply(
        hidden_TH, weight_VH, targets_T, teacher, divergence, vocab, chunk_size
    )
    return TokenValues(*values)


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        teacher: TeacherHidden | TeacherTop,
        divergence: Divergence,
        vocab: VocabSlice,
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        ctx.teacher, ctx.divergence, ctx.vocab = teacher, divergence, vocab
        ctx.chunk_size = chunk_size
        values: list[TokenValues] = []
        rows: list[_Rows] = []
        for chunk in chunks_of(len(hidden_TH), chunk_size):
            logits_TV = logits_of(hidden_TH[chunk], weight_VH, divergence, vocab)
            of_tokens, of_rows = _compute_chunk(
                logits_TV, targets_T[chunk], _part(teacher, chunk), divergence, vocab
            )
            values.append(of_tokens)
            rows.append(of_rows)
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        nothing = hidden_TH.new_zeros(0, dtype=wide)
        kept = [torch.cat([nothing, *parts]) for parts in zip(*rows, strict=True)] or [nothing] * 3
        ctx.save_for_backward(hidden_TH, weight_VH, *kept)
        found = [torch.cat([nothing, *parts]) for parts in zip(*values, strict=True)]
        found = found or [nothing.clone() for _ in TokenValues._fields]
        differentiable = TokenValues._fields.index("divergence")
        ctx.mark_non_differentiable(*found[:differentiable], *found[differentiable + 1 :])
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, *kept = ctx.saved_tensors
        grad_T = grads[TokenValues._fields.index("divergence")]
        grad_TH = torch.zeros_like(hidden_TH)
        grad_VH = None
        for chunk in chunks_of(len(hidden_TH), ctx.chunk_size):
            hidden = hidden_TH[chunk]
            logits_TV = logits_of(hidden, weight_VH, ctx.divergence, ctx.vocab)
            rows = _Rows(*(values[chunk] for values in kept))
            grad_TV = _logits_gradient(
                logits_TV,
                rows,
                grad_T[chunk] / ctx.divergence.temperature,
                _part(ctx.teacher, chunk),
                ctx.divergence,
                ctx.vocab,
            )
            grad_TH[chunk] = grad_TV @ weight_VH
            if ctx.needs_input_grad[1]:
                grad_VH = plus_product(grad_VH, grad_TV.t(), hidden)
        if ctx.needs_input_grad[1]:
            nothing = torch.zeros_like(weight_VH)
            grad_VH = nothing if grad_VH is None else grad_VH.to(weight_VH.dtype)
        return grad_TH, grad_VH, *[None] * 5


def _part(teacher: TeacherHidden | TeacherTop, chunk: slice) -> TeacherHidden | TeacherTop:
    if isinstance(teacher, TeacherHidden):
        return teacher._replace(hidden_TD=teacher.hidden_TD[chunk])
    return TeacherTop(teacher.ids_TK[chunk], teacher.logprobs_TK[chunk])


def _compute_chunk(
    logits_TV: Tensor,
    targets_T: Tensor,
    teacher: TeacherHidden | TeacherTop,
    divergence: Divergence,
    vocab: VocabSlice,
) -> tuple[TokenValues, _Rows]:
    temperature = divergence.temperature
    max_T, log_norm_T = norms(logits_TV, temperature, vocab)
    columns_T, is_local_T = vocab.columns(targets_T, logits_TV.shape[1])
    target_z_T = logits_TV.gather(-1, columns_T[:, None]).squeeze(-1).to(max_T.dtype) / temperature
    target_z_T = target_z_T.masked_fill(~is_local_T, 0.0)
    if isinstance(teacher, TeacherHidden):
        teacher_TV = logits_of(*teacher, divergence, vocab)
        _, teacher_log_norm_T = norms(teacher_TV, temperature, vocab)
        sums = fused(
            _sums,
            logits_TV,
            teacher_TV,
            log_norm_T,
            teacher_log_norm_T,
            divergence.beta,
            temperature,
        )
        *sums_T, target_z_T = vocab.all_reduce_(torch.stack([*sums, target_z_T]), dist.ReduceOp.SUM)
        value_T, inner_T, entropy_T, teacher_entropy_T = sums_T
    else:
        sums = [fused(_entropy_sum, logits_TV, log_norm_T, temperature), target_z_T]
        entropy_T, target_z_T = vocab.all_reduce_(torch.stack(sums), dist.ReduceOp.SUM)
        top_TK = _top_logprobs(logits_TV, teacher, log_norm_T, temperature, vocab)
        value_T = top_divergence(top_TK, teacher.logprobs_TK.to(top_TK.dtype), divergence.beta)
        teacher_log_norm_T = inner_T = torch.zeros_like(value_T)
        teacher_entropy_T = entropy_with_rest(teacher.logprobs_TK.to(top_TK.dtype))
    logprobs_T = target_z_T - log_norm_T
    is_likeliest_T = (target_z_T >= max_T).to(logprobs_T.dtype)
    values = TokenValues(logprobs_T, entropy_T, is_likeliest_T, value_T, teacher_entropy_T)
    return values, _Rows(log_norm_T, teacher_log_norm_T, inner_T)


def _sums(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    log_norm_T: Tensor,
    teacher_log_norm_T: Tensor,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[T] sums over a slice: divergence, what its gradient subtracts, entropies of both."""
    log_p_TV = log_probs(logits_TV, log_norm_T, temperature)
    log_q_TV = log_probs(teacher_TV, teacher_log_norm_T, temperature)
    p_TV, q_TV = log_p_TV.exp(), log_q_TV.exp()
    entropy_T, teacher_entropy_T = -(p_TV * log_p_TV).sum(-1), -(q_TV * log_q_TV).sum(-1)
    if beta == 0:
        value_T = (q_TV * (log_q_TV - log_p_TV)).sum(-1)
        inner_T = torch.zeros_like(value_T)
    elif beta == 1:
        value_T = inner_T = (p_TV * (log_p_TV - log_q_TV)).sum(-1)
    else:
        log_m_TV = log_mixture(log_p_TV, log_q_TV, beta)
        inner_T = (p_TV * (log_p_TV - log_m_TV)).sum(-1)
        value_T = beta * (q_TV * (log_q_TV - log_m_TV)).sum(-1) + (1 - beta) * inner_T
    return value_T, inner_T, entropy_T, teacher_entropy_T


def _entropy_sum(logits_TV: Tensor, log_norm_T: Tensor, temperature: float) -> Tensor:
    log_p_TV = log_probs(logits_TV, log_norm_T, temperature)
    return -(log_p_TV.exp() * log_p_TV).sum(-1)


# --- gradients -----------------------------------------------------------------------------------


def _logits_gradient(
    logits_TV: Tensor,
    rows: _Rows,
    grad_T: Tensor,
    teacher: TeacherHidden | TeacherTop,
    divergence: Divergence,
    vocab: VocabSlice,
) -> Tensor:
    """[T, V] gradients of the student's logits, in their type; `grad_T` is over the temperature."""
    temperature = divergence.temperature
    if isinstance(teacher, TeacherHidden):
        teacher_TV = logits_of(*teacher, divergence, vocab)
        return fused(_gradient, logits_TV, teacher_TV, *rows, grad_T, divergence.beta, temperature)
    top_TK = _top_logprobs(logits_TV, teacher, rows.log_norm_T, temperature, vocab)
    with torch.enable_grad():
        own_TK = top_TK.detach().requires_grad_()
        value_T = top_divergence(own_TK, teacher.logprobs_TK.to(own_TK.dtype), divergence.beta)
        (of_top_TK,) = torch.autograd.grad(value_T, own_TK, grad_T)
    # d log p_a / d z_v = 1[v = a] - p_v
    grad_TV = fused(_minus_probs, logits_TV, rows.log_norm_T, of_top_TK.sum(dim=-1), temperature)
    columns, is_local = vocab.columns(teacher.ids_TK, logits_TV.shape[1])
    own = of_top_TK.masked_fill(~is_local, 0.0)
    return grad_TV.scatter_add_(-1, columns, own).to(logits_TV.dtype)


def _gradient(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    log_norm_T: Tensor,
    teacher_log_norm_T: Tensor,
    inner_T: Tensor,
    grad_T: Tensor,
    beta: float,
    temperature: float,
) -> Tensor:
    log_p_TV = log_probs(logits_TV, log_norm_T, temperature)
    log_q_TV = log_probs(teacher_TV, teacher_log_norm_T, temperature)
    p_TV = log_p_TV.exp()
    if beta == 0:
        of_row_TV = p_TV - log_q_TV.exp()
    elif beta == 1:
        of_row_TV = p_TV * (log_p_TV - log_q_TV - inner_T[:, None])
    else:
        log_m_TV = log_mixture(log_p_TV, log_q_TV, beta)
        of_row_TV = (1 - beta) * p_TV * (log_p_TV - log_m_TV - inner_T[:, None])
    return (of_row_TV * grad_T[:, None]).to(logits_TV.dtype)


def _minus_probs(
    logits_TV: Tensor, log_norm_T: Tensor, factor_T: Tensor, temperature: float
) -> Tensor:
    return -log_probs(logits_TV, log_norm_T, temperature).exp() * factor_T[:, None]


# --- the likeliest tokens of the teacher ---------------------------------------------------------


def _top_logprobs(
    logits_TV: Tensor,
    teacher: TeacherTop,
    log_norm_T: Tensor,
    temperature: float,
    vocab: VocabSlice,
) -> Tensor:
    """[T, K] the student's log-probs of the teacher's likeliest tokens, the same on all ranks."""
    columns_TK, is_local_TK = vocab.columns(teacher.ids_TK, logits_TV.shape[1])
    z_TK = logits_TV.gather(-1, columns_TK).to(log_norm_T.dtype) / temperature
    z_TK = z_TK.masked_fill(~is_local_TK, 0.0)
    vocab.all_reduce_(z_TK, dist.ReduceOp.SUM)
    return (z_TK - log_norm_T[:, None]).clamp(min=NO_PROBABILITY)
