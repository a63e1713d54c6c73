"""The policy's optimizer: gradient buffers, AdamW and learning rates, from the config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rlsys.config import PolicyConfig, RunConfig
from rlsys.engines.megatron.options import megatron_config, optimizer_state_options

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


def gradient_config(
    policy: PolicyConfig, *, overlap_grads: bool, overlap_params: bool
) -> DistributedDataParallelConfig:
    """How gradients are held, and reduced over data-parallel ranks."""
    own = {
        "grad_reduce_in_fp32": policy.main_grads_dtype == "fp32",
        "use_distributed_optimizer": policy.use_distributed_optimizer,
        "overlap_grad_reduce": overlap_grads,
        "overlap_param_gather": overlap_params,
        "fp8_param_gather": policy.fp8_param_gather,
    }
    return megatron_config(DistributedDataParallelConfig, own, policy)


def build_optimizer(
    policy: PolicyConfig,
    chunks: Sequence[DistributedDataParallel],
    *,
    dtype: torch.dtype,
    overlap_params: bool,
) -> MegatronOptimizer:
    """AdamW over the trained parameters of `chunks`, whose weights are of type `dtype`."""
    own = {
        "optimizer": "adam",
        "lr": policy.lr,
        "min_lr": policy.min_lr,
        "weight_decay": policy.weight_decay,
        "adam_beta1": policy.adam_beta1,
        "adam_beta2": policy.adam_beta2,
        "adam_eps": policy.adam_eps,
        "clip_grad": policy.max_grad_norm,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "overlap_param_gather": overlap_params,
        **optimizer_state_options(policy),
    }
    return get_megatron_optimizer(megatron_config(OptimizerConfig, own, policy), list(chunks))


def step_prepared(optimizer: MegatronOptimizer) -> None:
    """Take the step of gradients for which `prepare_grads` was called.

    megatron-core's `step` calls it again. With a `loss_scale` that would divide gradients by it a
    second time, because they are changed in place.
    """
    optimizer.prepare_grads = lambda: False
    try:
        successful, *_ = optimizer.step()
    finally:
        del optimizer.prepare_grads
    assert successful, "steps that are not finite are skipped before"


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Learning rate and weight decay of every optimizer step of the run."""
    policy = config.policy
    total = config.num_steps * config.optimizer_steps_per_update
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=policy.lr,
        min_lr=policy.min_lr,
        lr_warmup_steps=math.ceil(policy.warmup_ratio * total),
        # The scheduler steps before each update, so the first update has lr > 0. total + 1
        # keeps the last one above min_lr.
        lr_decay_steps=total + 1,
        lr_decay_style=policy.lr_scheduler_type,
        start_wd=policy.weight_decay,
        end_wd=policy.weight_decay,
        wd_incr_steps=total,
        wd_incr_style="constant",
    )


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """What an optimizer updates and what it keeps for each parameter, with names for errors."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.optimizer is None:  # this rank has no parameter of a kind
            continue
        for group in one.optimizer.param_groups:
            yield from (("the optimizer's weights", parameter) for parameter in group["params"])
        for state in one.optimizer.state.values():
            for name, value in state.items():
                if torch.is_tensor(value):
                    yield f"the optimizer's {name}", value
