"""Norms that megatron-core does not have, in plain torch, for CPU and GPUs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads together, those of other ranks too.

    Args:
        hidden_size: numbers of one head.
        num_heads: heads of the whole model.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, num_heads: int):
        super().__init__()
        ranks = config.tensor_model_parallel_size
        self.eps, self.size = eps, num_heads * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(self.size // ranks, dtype=config.params_dtype))

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[..., heads of this rank, d] -> the same shape."""
        x = heads.flatten(-2).float()
        # Every rank's sum is in all ranks' outputs, so gradients are summed over ranks as well.
        squares = reduce_from_tensor_model_parallel_region(x.square().sum(-1, keepdim=True))
        squares = copy_to_tensor_model_parallel_region(squares)
        x = x * torch.rsqrt(squares / self.size + self.eps)
        return (self.weight * x).to(heads.dtype).view_as(heads)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """What megatron-core's checkpoints hold: the ranks' weights follow each other."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
