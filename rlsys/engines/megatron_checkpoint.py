"""Policy checkpoints through megatron-core's dist_checkpointing: exact, and reshardable.

Weights and optimizer state are stored by their place in the whole model, so that a run may
continue with other tensor, pipeline or data parallelism. No random state is stored, because no
update draws random numbers: dropout is 0 and mini-batches are a function of (seed, version).
"""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule


def save_policy(
    folder: Path,
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    policy_version: int,
) -> None:
    """Write a checkpoint into `folder`, which exists and is empty; every rank calls."""
    # Saving is synchronous here, so a plain queue does: the default one starts a server process,
    # which takes seconds and needs a __main__ that can be imported again.
    filesystem_async._results_queue = queue.Queue()
    state = _sharded_state(model, optimizer, is_loading=False)
    state |= {
        "scheduler": scheduler.state_dict(),
        "policy_version": policy_version,
        "use_distributed_optimizer": optimizer.config.use_distributed_optimizer,
        "shares_experts": _shares_experts(),
    }
    dist_checkpointing.save(state, str(folder))


def load_policy(
    folder: Path,
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> int:
    """Continue from the checkpoint in `folder`; returns its policy_version.

    Raises:
        ValueError: the optimizer's state is of the other kind.
    """
    common = dist_checkpointing.load_common_state_dict(str(folder))
    distributed = common["use_distributed_optimizer"]
    if distributed != optimizer.config.use_distributed_optimizer:
        raise ValueError(
            f"the checkpoint {folder} was written with policy.use_distributed_optimizer = "
            f"{str(distributed).lower()}: continue with the same value"
        )
    shared_experts = common.get("shares_experts", False)  # older checkpoints do not say
    if shared_experts != _shares_experts():
        was, must = ("above 1", "also above 1") if shared_experts else ("1", "also 1")
        raise ValueError(
            f"the checkpoint {folder} was written with policy.expert_model_parallel_size {was}, "
            f"when megatron-core has one optimizer for experts and one for the rest or one for "
            f"all: continue with a value that is {must}"
        )
    state = dist_checkpointing.load(_sharded_state(model, optimizer, is_loading=True), str(folder))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    # Only where it stands: the schedule itself is the config's, which may have been changed.
    scheduler.num_steps = 0
    scheduler.step(increment=state["scheduler"]["num_steps"])
    return state["policy_version"]


def _shares_experts() -> bool:
    """Whether experts have an optimizer of their own: their replicas are on other ranks."""
    return parallel_state.get_expert_model_parallel_world_size() > 1


def _sharded_state(
    model: MegatronModule, optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    weights = model.sharded_state_dict(metadata=metadata)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata
        ),
    }
