"""Rules between the policy's fields that save memory: recompute, optimizer state, FP8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.schema import PolicyConfig

MOMENT_DTYPES = ("exp_avg_dtype", "exp_avg_sq_dtype")
OPTIMIZER_DTYPES = ("main_params_dtype", "main_grads_dtype", *MOMENT_DTYPES)
"""Fields of policy that use_precision_aware_optimizer is for."""


def memory_rule_problems(policy: PolicyConfig) -> Iterator[Problem]:
    """Every rule among these fields that `policy` breaks, on any machine."""
    yield from _recompute_problems(policy)
    yield from _optimizer_problems(policy)
    yield from _fp8_problems(policy)


def _changed(policy: PolicyConfig, *names: str) -> list[str]:
    """Those of the fields that are not their defaults, which a run's saved config names too."""
    fields = type(policy).model_fields
    return [name for name in names if getattr(policy, name) != fields[name].default]


def _recompute_problems(policy: PolicyConfig) -> Iterator[Problem]:
    for wanted, names in (
        ("selective", ("recompute_modules",)),
        ("full", ("recompute_method", "recompute_num_layers")),
    ):
        for name in _changed(policy, *names) if policy.recompute != wanted else ():
            yield Problem(
                f"policy.{name} is for policy.recompute = {wanted}, and that is "
                f"{policy.recompute}: set it to {wanted}, or leave {name} out"
            )


def _optimizer_problems(policy: PolicyConfig) -> Iterator[Problem]:
    if policy.use_precision_aware_optimizer:
        if not policy.use_distributed_optimizer:
            yield Problem(
                "policy.use_precision_aware_optimizer is a part of megatron-core's distributed "
                "optimizer, and policy.use_distributed_optimizer is false: set that to true"
            )
    else:
        for name in _changed(policy, *OPTIMIZER_DTYPES):
            yield Problem(
                f"policy.{name} = {getattr(policy, name)} is for "
                "policy.use_precision_aware_optimizer, and that is false: set it to true, or leave "
                f"{name} out"
            )
    if not policy.optimizer_cpu_offload:
        for name in _changed(policy, "optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"):
            yield Problem(
                f"policy.{name} is for policy.optimizer_cpu_offload, and that is false: set it to "
                f"true, or leave {name} out"
            )
        return
    if not policy.use_precision_aware_optimizer:
        yield Problem(
            "policy.optimizer_cpu_offload needs policy.use_precision_aware_optimizer, whose way "
            "megatron-core takes for it: set that to true as well"
        )
    for name in _changed(policy, "main_params_dtype", *MOMENT_DTYPES):
        yield Problem(
            f"policy.{name} = {getattr(policy, name)} has no effect with "
            "policy.optimizer_cpu_offload, whose state is float32 on both devices: leave one out"
        )


def _fp8_problems(policy: PolicyConfig) -> Iterator[Problem]:
    if policy.fp8_format is None:
        for name in _changed(policy, "fp8_recipe", "fp8_param_gather"):
            yield Problem(
                f"policy.{name} is for policy.fp8_format, and that is null: set it to hybrid or "
                f"e4m3, or leave {name} out"
            )
        return
    late = [name for name in policy.recompute_modules if name in ("layernorm", "moe_act")]
    if policy.recompute == "selective" and late and policy.fp8_recipe == "delayed":
        yield Problem(
            f"policy.recompute_modules: {', '.join(late)} cannot be computed again with "
            "policy.fp8_recipe = delayed, by megatron-core: use another recipe, or other modules"
        )
    if not policy.fp8_param_gather:
        return
    if not policy.use_distributed_optimizer:
        yield Problem(
            "policy.fp8_param_gather is a part of megatron-core's distributed optimizer, and "
            "policy.use_distributed_optimizer is false: set that to true"
        )
    if policy.fp8_recipe == "mxfp8":
        yield Problem(
            "policy.fp8_param_gather with policy.fp8_recipe = mxfp8 is not there, because "
            "megatron-core then sends weights in the buffer of gradients: use another recipe, or "
            "leave fp8_param_gather out"
        )
    if policy.fp8_recipe == "delayed" and policy.use_precision_aware_optimizer:
        yield Problem(
            "policy.fp8_param_gather with policy.fp8_recipe = delayed cannot be used with "
            "policy.use_precision_aware_optimizer, whose float32 weights checkpoints could not put "
            "back into FP8: use the recipe tensorwise"
        )
    if policy.lora is not None:
        yield Problem(
            "policy.fp8_param_gather with policy.lora is not there: adapters are beside weights in "
            "the model's type. Leave fp8_param_gather out; fp8_format works with lora"
        )
    if policy.optimizer_cpu_offload:
        yield Problem(
            "policy.fp8_param_gather cannot be used with policy.optimizer_cpu_offload, which "
            "updates weights that are not FP8: leave one out"
        )
