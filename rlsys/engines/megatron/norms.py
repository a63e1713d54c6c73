"""Norms that megatron-core does not have, in plain torch, for CPU and GPUs."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads together, also the heads of other ranks.

    Every rank has the weights of all heads: megatron-core sums the gradients of whatever is called
    q_layernorm or k_layernorm over tensor-parallel ranks.

    Args:
        hidden_size: numbers of one head.
        num_heads: heads of the whole model.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, num_heads: int):
        super().__init__()
        self.eps, self.size = eps, num_heads * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(self.size, dtype=config.params_dtype))

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[..., heads of this rank, d] -> the same shape."""
        x = heads.flatten(-2).float()
        # Every rank's sum is in all ranks' outputs, so gradients are summed over ranks as well.
        squares = reduce_from_tensor_model_parallel_region(x.square().sum(-1, keepdim=True))
        squares = copy_to_tensor_model_parallel_region(squares)
        x = x * torch.rsqrt(squares / self.size + self.eps)
        start = parallel_state.get_tensor_model_parallel_rank() * x.shape[-1]
        weight = self.weight[start : start + x.shape[-1]]
        return (weight * x).to(heads.dtype).view_as(heads)
