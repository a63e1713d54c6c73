"""Context parallelism: the tokens of a micro-batch cut over ranks, and gathered again.

Every sequence is cut into 2 * size equal chunks. Rank r has the chunks r and 2 * size - 1 - r: a
token attends to all before it, so a late chunk makes up for an early one. megatron-core and
Transformer Engine expect this cut. Only attention combines tokens. Log-probs are gathered before
the loss, so that each rank computes the whole loss, also one over sequences, and its gradient flows
back to the rank's own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def chunk_positions(cu_seqlens: Tensor, size: int) -> Tensor:
    """[size, T / size] int64, the positions of each rank, in its order.

    Args:
        cu_seqlens: [B + 1], see `PackedMicroBatch`; every length is a multiple of 2 * size, unless
            size is 1.
        size: number of ranks that share the tokens.
    """
    lengths_B = cu_seqlens.diff().long()
    positions_T = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    if size == 1:
        return positions_T[None]
    assert not (lengths_B % (2 * size)).any(), (lengths_B, size)
    sequence_T = torch.repeat_interleave(lengths_B)
    offsets_T = positions_T - cu_seqlens[sequence_T]
    chunk_T = offsets_T // (lengths_B // (2 * size))[sequence_T]
    rank_T = torch.minimum(chunk_T, 2 * size - 1 - chunk_T)
    return torch.argsort(rank_T, stable=True).view(size, -1)


def gather_tokens(
    values: Tensor, positions_CT: Tensor, group: dist.ProcessGroup, *, sum_gradients: bool
) -> Tensor:
    """[T, ...], all tokens in their order, from this rank's [T / size, ...]; with gradient.

    Args:
        values: at `positions_CT[group.rank()]`.
        positions_CT: from `chunk_positions`.
        group: the ranks that share the tokens.
        sum_gradients: True if each rank uses a different part of the result, so that the gradients
            of all ranks count; False if each rank computes the whole loss.
    """
    if group.size() == 1:
        return values
    return _GatherTokens.apply(values, positions_CT, group, sum_gradients)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        positions_CT: Tensor,
        group: dist.ProcessGroup,
        sum_gradients: bool,
    ) -> Tensor:
        ctx.positions_CT, ctx.group, ctx.sum_gradients = positions_CT, group, sum_gradients
        ctx.set_materialize_grads(False)
        parts = [torch.empty_like(values) for _ in range(group.size())]
        dist.all_gather(parts, values.contiguous(), group=group)
        gathered = values.new_empty(positions_CT.numel(), *values.shape[1:])
        gathered[positions_CT.flatten()] = torch.cat(parts)
        return gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is not None:
            if ctx.sum_gradients:
                grad = grad.contiguous().clone()
                dist.all_reduce(grad, group=ctx.group)
            grad = grad[ctx.positions_CT[ctx.group.rank()]]
        return grad, None, None, None
