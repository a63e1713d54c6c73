"""megatron-core's configs: rlsys's own options, and those that policy.megatron_kwargs passes on."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state

from rlsys.config import PolicyConfig
from rlsys.library_options import DTYPES
from rlsys.model.attention import attention_problem, model_attention_problem
from rlsys.model.memory_options import memory_option_problems
from rlsys.model.shape import ModelShape
from rlsys.types import Device

Options = TypeVar("Options")


_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.uint8,  # Transformer Engine's name for the bytes, with a scale beside them
}


def optimizer_state_options(policy: PolicyConfig) -> dict[str, Any]:
    """OptimizerConfig's options on how and where the optimizer's state is held."""
    return {
        "use_distributed_optimizer": policy.use_distributed_optimizer,
        "use_precision_aware_optimizer": policy.use_precision_aware_optimizer,
        "main_params_dtype": _DTYPES[policy.main_params_dtype],
        "main_grads_dtype": _DTYPES[policy.main_grads_dtype],
        "exp_avg_dtype": _DTYPES[policy.exp_avg_dtype],
        "exp_avg_sq_dtype": _DTYPES[policy.exp_avg_sq_dtype],
        "optimizer_cpu_offload": policy.optimizer_cpu_offload,
        "optimizer_offload_fraction": policy.optimizer_offload_fraction,
        "overlap_cpu_optimizer_d2h_h2d": policy.overlap_cpu_optimizer_d2h_h2d,
        "fp8_recipe": None if policy.fp8_format is None else policy.fp8_recipe,
    }


def check_machine(
    shape: ModelShape, *, dtype: torch.dtype, policy: PolicyConfig, on_cpu: bool, bridged: bool
) -> None:
    """Refuse what this machine lacks for the model, once the parallel layout is initialised.

    Raises:
        ValueError: it lacks the attention of policy.attention_backend, or an option that saves
            memory.
    """
    device: Device = "cpu" if on_cpu else "cuda"
    dtype_name = str(dtype).rpartition(".")[2]
    context_parallel_size = parallel_state.get_context_parallel_world_size()
    problems = (
        attention_problem(
            policy.attention_backend,
            context_parallel_size=context_parallel_size,
            device=device,
            dtype=dtype_name,
        ),
        model_attention_problem(
            shape,
            backend=policy.attention_backend,
            context_parallel_size=context_parallel_size,
            device=device,
            bridged=bridged,
        ),
        *memory_option_problems(
            policy,
            shape,
            device=device,
            dtype=dtype_name,
            capability=None if on_cpu else torch.cuda.get_device_capability(),
        ),
    )
    for problem in problems:
        if problem is not None:
            raise ValueError(problem.text)


def megatron_config(cls: type[Options], own: dict[str, Any], policy: PolicyConfig) -> Options:
    """A config of megatron-core: `own` options, and those passed through that `cls` has.

    An option that several classes have goes to each of them. `rlsys.config.passed_through` has
    refused what must stay as it is in `own`.
    """
    passed = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in policy.megatron_kwargs:
            value = policy.megatron_kwargs[field.name]
            is_dtype = "dtype" in str(field.type) and value in DTYPES
            passed[field.name] = getattr(torch, value) if is_dtype else value
    return cls(**own | passed)
