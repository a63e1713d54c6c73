"""The process groups of megatron-core: which ranks share a model, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from rlsys.types import Device


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """This rank's place among the ranks of its role."""

    rank: int
    world_size: int
    timeout_s: float
    """Seconds that a collective may take."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1


def initialize_parallel(
    layout: ParallelLayout, store: dist.Store, *, device: Device, seed: int
) -> None:
    """Join the process group at the ranks' common store, and build megatron-core's groups."""
    _let_others_read_tensors()
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=layout.rank,
        world_size=layout.world_size,
        timeout=timedelta(seconds=layout.timeout_s),
    )
    parallel_state.initialize_model_parallel(
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        # None, not 1: any number is the interleaved schedule.
        layout.virtual_pipeline_size if layout.virtual_pipeline_size > 1 else None,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # an expert is small enough to be whole on a rank
        context_parallel_size=layout.context_parallel_size,
        distributed_timeout_minutes=max(1, math.ceil(layout.timeout_s / 60)),
    )
    model_parallel_cuda_manual_seed(seed)


def _let_others_read_tensors() -> None:
    """Have pickles of tensors name torch's own loader, also where megatron-core (0.19) replaced it.

    Otherwise a process that gets log-probs, such as the driver, imports megatron-core and
    Transformer Engine to read them.
    """
    loader = torch.storage._load_from_bytes  # type: ignore[attr-defined]
    loader.__module__, loader.__qualname__ = "torch.storage", "_load_from_bytes"
