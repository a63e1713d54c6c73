"""Log-probs and entropies of given tokens, from logits that may be split over the vocabulary.

`log pi(a) = z_a - log sum_v exp(z_v)` with `z = logits / temperature`, over the tokens that can be
sampled (`Sampling`): the policy's distribution is the one that completions are sampled from.

With a `VocabSlice`, each rank holds a slice of the vocabulary. Maxima and sums are reduced over its
group, so every rank returns the same numbers and, by computing the same loss from them, gets the
same gradient for each log-prob. The gradient of a rank's own logits then needs no communication:

    d log pi(a) / d z_v = 1[v = a] - pi(v)
    d H / d z_v = -pi(v) (log pi(v) + H), with the entropy H

The gradient of a reduced sum goes to every rank's term as it is, unlike with torch.distributed.nn,
which would add up the equal gradients of all ranks. The gradient of the hidden states is this
rank's share. The op that gave every rank the same hidden states sums the shares on its way back, as
megatron-core's do (copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from rlsys.algo.penalties import History, penalize_
from rlsys.algo.sampling import WHOLE_VOCABULARY, Sampling, VocabSlice, fused, leave_out_

NO_PROBABILITY = -1e4
"""Nats whose exp() is 0 in every type, and that may be multiplied."""


class TokenValues(NamedTuple):
    """What logits say of each target, [T] each."""

    logprobs: Tensor
    """In nats, with gradient."""
    entropy: Tensor
    """The distribution's, in nats, with gradient."""
    is_likeliest: Tensor
    """1 where no token is likelier than the target, else 0."""
    divergence: Tensor | None = None
    """From the teacher's distribution, in nats, with gradient, where there is a teacher; then the
    others have none. See `rlsys.algo.divergence`."""
    teacher_entropy: Tensor | None = None
    """Of the teacher's distribution, in nats."""


def chunked_logprobs(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution, of `chunked_token_values`."""
    return chunked_token_values(*args, **kwargs)[:2]


def chunked_token_values(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    sampling: Sampling,
    vocab: VocabSlice = WHOLE_VOCABULARY,
    chunk_size: int,
    recompute: bool = True,
    history: History | None = None,
) -> TokenValues:
    """Log-prob of each target, and what else its distribution is asked for.

    The logits are `hidden_TH @ weight_VH.T`. They exist for `chunk_size` tokens at a time; with
    gradients they are computed again on the way back, so that only `hidden_TH` is kept, and the
    last chunk's logits, with which the way back begins. At a vocabulary of 152k, logits of 16k
    tokens take 4.6 GiB in bfloat16; a chunk's 1,024 tokens take 0.3 GiB. The gradient of
    `weight_VH`, unless it is frozen, is summed over chunks in float32, and rounded once.

    Computed in float32 (float64 for float64 logits), the type of the results; a gradient has the
    type of its tensor. The choice of tokens by min_p, top_k and top_p counts as constant.

    Args:
        hidden_TH: [T, H], the same on every rank that shares the vocabulary.
        weight_VH: [V, H], this rank's slice of the output layer.
        targets_T: [T] int64, token ids of the whole vocabulary.
        sampling: temperature, and the tokens that the distribution is over.
        vocab: this rank's slice of the vocabulary.
        chunk_size: tokens whose logits exist at once.
        recompute: False keeps the logits of all chunks for the way back, in the type of
            `hidden_TH`, which saves one of four products with `weight_VH`. Penalized logits are
            always computed again.
        history: the tokens before each target; needed where `sampling` penalizes them.
    """
    assert (history is not None) == sampling.penalizes
    num_kept = 0
    if torch.is_grad_enabled() and not sampling.penalizes:
        num_kept = 1 if recompute else -(-len(hidden_TH) // chunk_size)
    values = _ChunkedLogprobs.apply(
        hidden_TH, weight_VH, targets_T, sampling, vocab, chunk_size, num_kept, history
    )
    return TokenValues(*values)


class _ChunkedLogprobs(torch.autograd.Function):
    """One node for all chunks, so that their gradients of the weight can be summed in one place.

    Keeps a few numbers a row, from which backward computes the softmax again: autograd's own graph
    of the formula would keep several [T, V] tensors in float32. It keeps the logits of the last
    `num_kept` chunks, too, each until backward, which begins with the last, has used them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        sampling: Sampling,
        vocab: VocabSlice,
        chunk_size: int,
        num_kept: int,
        history: History | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_chunk, floors, kept_logits = [], [], []
        chunks = _chunks(len(hidden_TH), chunk_size)
        for i, chunk in enumerate(chunks):
            targets = targets_T[chunk]
            logits = linear(hidden_TH[chunk], weight_VH)
            if history is not None:
                penalize_(logits, history.rows(chunk), sampling, vocab)
            floors.append(leave_out_(logits, targets, sampling, vocab))
            by_chunk.append(_compute_rows(logits, targets, sampling.temperature, vocab))
            if i >= len(chunks) - num_kept:
                kept_logits.append(logits)
        rows = _Rows(*(torch.cat(values) for values in zip(*by_chunk, strict=True)))
        ctx.save_for_backward(hidden_TH, weight_VH, *rows)
        ctx.kept_logits = kept_logits
        # What backward needs to leave the same tokens out of logits that it computes again.
        ctx.sampling, ctx.vocab, ctx.floors, ctx.targets_T = sampling, vocab, floors, targets_T
        ctx.chunk_size, ctx.history = chunk_size, history
        ctx.set_materialize_grads(False)  # entropy that no loss uses costs nothing
        ctx.mark_non_differentiable(rows.is_likeliest_T)
        return rows.logprobs_T, rows.entropy_T, rows.is_likeliest_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_T: Tensor | None, entropy_grad_T: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, *rows = ctx.saved_tensors
        grad_TH, grad_VH = torch.empty_like(hidden_TH), None
        chunks = list(enumerate(_chunks(len(hidden_TH), ctx.chunk_size)))
        for i, chunk in reversed(chunks):
            hidden, factor_TV = hidden_TH[chunk], None
            if ctx.kept_logits:
                logits = ctx.kept_logits.pop()
            else:
                logits = linear(hidden, weight_VH)
                if ctx.history is not None:
                    history = ctx.history.rows(chunk)
                    factor_TV = penalize_(logits, history, ctx.sampling, ctx.vocab)
                leave_out_(logits, ctx.targets_T[chunk], ctx.sampling, ctx.vocab, ctx.floors[i])
            grad_TV = _logits_gradient(
                logits,
                _Rows(*(values[chunk] for values in rows)),
                None if grad_T is None else grad_T[chunk],
                None if entropy_grad_T is None else entropy_grad_T[chunk],
                ctx.sampling.temperature,
            )
            if factor_TV is not None:
                grad_TV *= factor_TV
            grad_TH[chunk] = grad_TV @ weight_VH
            if ctx.needs_input_grad[1]:
                grad_VH = plus_product(grad_VH, grad_TV.t(), hidden)
        return grad_TH, None if grad_VH is None else grad_VH.to(weight_VH.dtype), *[None] * 6


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right` in float32 or a wider type, in the place of `total`; None is 0."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if not left.is_cuda:  # the CPU has no kernel of two types: there a product is rounded
        product = (left @ right).to(wide)
        return product if total is None else total.add_(product)
    if total is None:
        total = left.new_zeros(len(left), right.shape[1], dtype=wide)
    if wide == left.dtype:
        return total.addmm_(left, right)
    return torch.addmm(total, left, right, out_dtype=wide, out=total)


class _Rows(NamedTuple):
    """What the forward pass knows of every row of logits."""

    log_norm_T: Tensor
    """log sum_v exp(z_v)"""
    logprobs_T: Tensor
    entropy_T: Tensor
    is_likeliest_T: Tensor
    columns_T: Tensor
    is_local_T: Tensor
    """With columns_T: see VocabSlice.columns."""


def _compute_rows(
    logits_TV: Tensor, targets_T: Tensor, temperature: float, vocab: VocabSlice
) -> _Rows:
    columns_T, is_local_T = vocab.columns(targets_T, logits_TV.shape[1])
    max_T, sum_exp_T, sum_exp_z_T = fused(_row_sums, logits_TV, temperature)
    target_z_T = logits_TV.gather(-1, columns_T[:, None]).squeeze(-1).to(max_T.dtype) / temperature
    if vocab.group is None:
        target_z_T = target_z_T - max_T
    else:
        shift_T = max_T.clone()
        vocab.all_reduce_(max_T, dist.ReduceOp.MAX)
        # The sums of this rank's slice, taken against the maximum of all slices.
        shift_T = (shift_T - max_T).clamp(min=NO_PROBABILITY)
        sum_exp_z_T = shift_T.exp() * (sum_exp_z_T + shift_T * sum_exp_T)
        sum_exp_T = shift_T.exp() * sum_exp_T
        target_z_T = (target_z_T - max_T).masked_fill(~is_local_T, 0.0)
        sums = torch.stack([sum_exp_T, sum_exp_z_T, target_z_T])
        sum_exp_T, sum_exp_z_T, target_z_T = vocab.all_reduce_(sums, dist.ReduceOp.SUM)
    log_sum_T = sum_exp_T.log()
    logprobs_T = target_z_T - log_sum_T
    # H = -sum_v pi(v) log pi(v) = log sum_v exp(z_v) - sum_v pi(v) z_v
    entropy_T = log_sum_T - sum_exp_z_T / sum_exp_T
    is_likeliest_T = (target_z_T >= 0).to(logprobs_T.dtype)
    log_norm_T = max_T + log_sum_T
    return _Rows(log_norm_T, logprobs_T, entropy_T, is_likeliest_T, columns_T, is_local_T)


def _logits_gradient(
    logits_TV: Tensor,
    rows: _Rows,
    grad_T: Tensor | None,
    entropy_grad_T: Tensor | None,
    temperature: float,
) -> Tensor:
    """[T, V] gradients of the logits, in their type, from the log-probs' and the entropies'."""
    grad_T = torch.zeros_like(rows.logprobs_T) if grad_T is None else grad_T / temperature
    # 1 - pi(a) for the target: in the narrow type of the logits, the 1 added to -pi(a) would
    # lose all digits of a likely token.
    target_grad_T = -torch.expm1(rows.logprobs_T) * grad_T
    if entropy_grad_T is None:
        grad_TV = fused(_softmax_grad, logits_TV, rows.log_norm_T, grad_T, temperature)
    else:
        of_entropy_T = entropy_grad_T / temperature
        grad_TV = fused(
            _softmax_grad_with_entropy,
            logits_TV,
            rows.log_norm_T,
            grad_T,
            of_entropy_T,
            rows.entropy_T,
            temperature,
        )
        target_grad_T = target_grad_T - (
            rows.logprobs_T.exp() * (rows.logprobs_T + rows.entropy_T) * of_entropy_T
        )
    columns_T1, is_local_T1 = rows.columns_T[:, None], rows.is_local_T[:, None]
    kept_T1 = grad_TV.gather(-1, columns_T1)
    target_grad_T1 = target_grad_T[:, None].to(grad_TV.dtype)
    return grad_TV.scatter_(-1, columns_T1, torch.where(is_local_T1, target_grad_T1, kept_T1))


def _row_sums(logits_TV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three [T]: m = max_v z_v, sum_v exp(z_v - m), sum_v exp(z_v - m) (z_v - m)."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    lowest = torch.finfo(torch.float32).min
    z_TV = logits_TV.to(wide) / temperature
    # The bounds change no exp(), and make a logit of -inf contribute 0 instead of nan, also where
    # all logits of a slice are -inf.
    max_T = z_TV.amax(dim=-1).clamp(min=lowest)
    z_TV = (z_TV - max_T[:, None]).clamp(min=lowest)
    exp_TV = z_TV.exp()
    return max_T, exp_TV.sum(dim=-1), (exp_TV * z_TV).sum(dim=-1)


def _softmax_grad(
    logits_TV: Tensor, log_norm_T: Tensor, grad_T: Tensor, temperature: float
) -> Tensor:
    """`-grad * pi(v)`, [T, V] in the type of the logits: the gradient but for the targets."""
    log_probs_TV = logits_TV.to(log_norm_T.dtype) / temperature - log_norm_T[:, None]
    return (log_probs_TV.exp() * -grad_T[:, None]).to(logits_TV.dtype)


def _softmax_grad_with_entropy(
    logits_TV: Tensor,
    log_norm_T: Tensor,
    grad_T: Tensor,
    of_entropy_T: Tensor,
    entropy_T: Tensor,
    temperature: float,
) -> Tensor:
    """`-pi(v) (grad + of_entropy (log pi(v) + H))`, as `_softmax_grad`."""
    log_probs_TV = logits_TV.to(log_norm_T.dtype) / temperature - log_norm_T[:, None]
    # A logit of -inf has no probability and no gradient; without the bound 0 * -inf = nan.
    log_probs_TV = log_probs_TV.clamp(min=NO_PROBABILITY)
    factor_TV = grad_T[:, None] + of_entropy_T[:, None] * (log_probs_TV + entropy_T[:, None])
    return (log_probs_TV.exp() * -factor_TV).to(logits_TV.dtype)
