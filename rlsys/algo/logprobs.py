"""Log-probs of given tokens, from logits that may be split over the vocabulary.

`log pi(a) = z_a - log sum_v exp(z_v)` with `z = logits / temperature`: the policy's log-probs are
taken at the temperature that completions were sampled at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint


def vocab_parallel_logprobs(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution: two [T] tensors in nats.

    With `group`, each rank holds a slice of the vocabulary. Maxima and sums are reduced over the
    group, so every rank returns the same numbers and, by computing the same loss from them, gets
    the same gradient for each log-prob. What flows back into a rank's own logits then needs no
    communication: `d log pi(a) / d z_v = 1[v = a] - pi(v)` and, of the entropy H,
    `d H / d z_v = -pi(v) (log pi(v) + H)`. The gradient of a reduced sum goes to
    every rank's term as it is, unlike with torch.distributed.nn, which would add up the equal
    gradients of all ranks.

    Computed in float32 (float64 for float64 logits), which is also the type of the results;
    gradients have the type of the logits. Logits may be -inf (a padded vocabulary).

    Args:
        logits_TV: [T, V], this rank's slice of the vocabulary.
        targets_T: [T] int64, token ids of the whole vocabulary.
        temperature: divides the logits; 1 for logits that are already divided.
        vocab_start: token id of `logits_TV[:, 0]`.
        group: the tensor-parallel group; None when the vocabulary is whole.

    Returns:
        `logprobs_T` and `entropy_T`, both with gradient.
    """
    return _VocabParallelLogprobs.apply(logits_TV, targets_T, temperature, vocab_start, group)


class _VocabParallelLogprobs(torch.autograd.Function):
    """Keeps the logits as they came and two numbers a row; backward computes the softmax anew.

    Autograd's own graph of the same formula would keep several [T, V] tensors in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        targets_T: Tensor,
        temperature: float,
        vocab_start: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        max_T = logits_TV.amax(dim=-1).to(wide) / temperature
        if group is not None:
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
        local_T, is_local_T = _local_targets(targets_T, vocab_start, logits_TV.shape[1], group)
        target_z_T = logits_TV.gather(-1, local_T[:, None]).squeeze(-1).to(wide) / temperature
        sum_exp_T, sum_exp_z_T = _pass(_row_sums, logits_TV, max_T, temperature)
        sums = torch.stack(
            [sum_exp_T, sum_exp_z_T, (target_z_T - max_T).masked_fill(~is_local_T, 0.0)]
        )
        if group is not None:
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
        sum_exp_T, sum_exp_z_T, target_z_T = sums
        log_sum_T = sum_exp_T.log()
        logprobs_T = target_z_T - log_sum_T
        # H = -sum_v pi(v) log pi(v) = log sum_v exp(z_v) - sum_v pi(v) z_v
        entropy_T = log_sum_T - sum_exp_z_T / sum_exp_T

        ctx.save_for_backward(
            logits_TV,
            max_T + log_sum_T,
            logprobs_T,
            entropy_T,
            local_T[:, None],
            is_local_T[:, None],
        )
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # entropy that no loss uses costs nothing
        return logprobs_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_T: Tensor | None, entropy_grad_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits_TV, log_norm_T, logprobs_T, entropy_T, local_T1, is_local_T1 = ctx.saved_tensors
        grad_T = torch.zeros_like(logprobs_T) if grad_T is None else grad_T / ctx.temperature
        # 1 - pi(a) for the target: in the narrow type of the logits, the 1 added to -pi(a) would
        # lose all digits of a likely token.
        target_grad_T = -torch.expm1(logprobs_T) * grad_T
        if entropy_grad_T is None:
            grad_TV = _pass(_logits_grad, logits_TV, log_norm_T, grad_T, ctx.temperature)
        else:
            of_entropy_T = entropy_grad_T / ctx.temperature
            grad_TV = _pass(
                _logits_grad_with_entropy,
                logits_TV,
                log_norm_T,
                grad_T,
                of_entropy_T,
                entropy_T,
                ctx.temperature,
            )
            target_grad_T = (
                target_grad_T - logprobs_T.exp() * (logprobs_T + entropy_T) * of_entropy_T
            )
        target_grad_T1 = target_grad_T[:, None].to(grad_TV.dtype)
        kept_T1 = grad_TV.gather(-1, local_T1)
        grad_TV.scatter_(-1, local_T1, torch.where(is_local_T1, target_grad_T1, kept_T1))
        return grad_TV, None, None, None, None


def _row_sums(logits_TV: Tensor, max_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """sum_v exp(z_v) and sum_v exp(z_v) z_v, with z shifted by its maximum: two [T]."""
    z_TV = logits_TV.to(max_T.dtype) / temperature - max_T[:, None]
    # The bound changes no exp(), and makes a logit of -inf contribute 0 to the entropy instead of
    # 0 * -inf = nan.
    z_TV = z_TV.clamp(min=torch.finfo(torch.float32).min)
    exp_TV = z_TV.exp()
    return exp_TV.sum(dim=-1), (exp_TV * z_TV).sum(dim=-1)


def _logits_grad(
    logits_TV: Tensor, log_norm_T: Tensor, grad_T: Tensor, temperature: float
) -> Tensor:
    """`-grad * pi(v)`, [T, V] in the type of the logits: the gradient but for the targets."""
    log_probs_TV = logits_TV.to(log_norm_T.dtype) / temperature - log_norm_T[:, None]
    return (log_probs_TV.exp() * -grad_T[:, None]).to(logits_TV.dtype)


def _logits_grad_with_entropy(
    logits_TV: Tensor,
    log_norm_T: Tensor,
    grad_T: Tensor,
    of_entropy_T: Tensor,
    entropy_T: Tensor,
    temperature: float,
) -> Tensor:
    """`-pi(v) (grad + of_entropy (log pi(v) + H))`, as `_logits_grad`."""
    log_probs_TV = logits_TV.to(log_norm_T.dtype) / temperature - log_norm_T[:, None]
    # A logit of -inf has no probability and no gradient; without the bound 0 * -inf = nan.
    log_probs_TV = log_probs_TV.clamp(min=NO_PROBABILITY)
    factor_TV = grad_T[:, None] + of_entropy_T[:, None] * (log_probs_TV + entropy_T[:, None])
    return (log_probs_TV.exp() * -factor_TV).to(logits_TV.dtype)


NO_PROBABILITY = -1e4
"""Nats of which exp() is 0 in every type, small enough to be multiplied."""

_fused = functools.cache(functools.partial(torch.compile, dynamic=True))


def _pass(function: Callable[..., Any], logits_TV: Tensor, *args: Any) -> Any:
    """Run a chain of element-wise ops and sums over [T, V].

    Off the CPU as one kernel: op by op, each would read and write the whole tensor in float32,
    which took two fifths of an update of a 1.5B model. On CPU compiling takes longer than it saves.
    """
    if logits_TV.device.type != "cpu":
        function = _fused(function)
    return function(logits_TV, *args)


def _local_targets(
    targets_T: Tensor, vocab_start: int, vocab_size: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Targets as columns of this rank's slice, and which of them it holds (column 0 otherwise)."""
    local_T = targets_T - vocab_start
    if group is None:
        return local_T, torch.ones_like(local_T, dtype=torch.bool)
    is_local_T = (local_T >= 0) & (local_T < vocab_size)
    return local_T.masked_fill(~is_local_T, 0), is_local_T


def chunked_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`vocab_parallel_logprobs` of `hidden_TH @ weight_VH.T`, never holding all logits at once.

    Logits exist for `chunk_size` tokens at a time; with gradients they are computed again on the
    way back (torch.utils.checkpoint), so that only `hidden_TH` is kept. At a vocabulary of 152k,
    float32 logits of 16k tokens take 9.3 GiB, those of a chunk of 1,024 take 0.6 GiB.

    With `group`, the gradient of `hidden_TH` is this rank's share, from its slice of the
    vocabulary. The op that gave every rank the same hidden states sums the shares on its way back,
    as those of megatron-core do (copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region).

    Args:
        hidden_TH: [T, H], the same on every rank of `group`.
        weight_VH: [V, H], this rank's slice of the output layer.
        targets_T: [T] int64, token ids of the whole vocabulary.
        temperature: divides the logits.
        chunk_size: tokens whose logits exist at once.
        vocab_start: token id of `weight_VH[0]`.
        group: the tensor-parallel group; None when the vocabulary is whole.

    Returns:
        `logprobs_T` and `entropy_T`, both with gradient.
    """

    def one_chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_parallel_logprobs(
            linear(hidden, weight),
            targets,
            temperature=temperature,
            vocab_start=vocab_start,
            group=group,
        )

    chunks = []
    for hidden, targets in zip(
        hidden_TH.split(chunk_size), targets_T.split(chunk_size), strict=True
    ):
        if torch.is_grad_enabled():
            # Nothing random happens in a chunk, so random states need not be kept.
            chunk = checkpoint(
                one_chunk,
                hidden,
                weight_VH,
                targets,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            chunk = one_chunk(hidden, weight_VH, targets)
        chunks.append(chunk)
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
