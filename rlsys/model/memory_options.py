"""Whether options that save memory exist: for a run's device, its type, and its model.

Imports neither torch nor Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.pipeline_layout import rank_layers
from rlsys.model.shape import ModelShape
from rlsys.problems import Problem
from rlsys.types import Device

if TYPE_CHECKING:
    from rlsys.config import PolicyConfig

FP8_CAPABILITIES = {
    "tensorwise": (8, 9),
    "delayed": (8, 9),
    "blockwise": (9, 0),
    "mxfp8": (10, 0),
}
"""CUDA compute capability from which Transformer Engine has a recipe: 8.9 is Ada, 9.0 Hopper, 10.0
Blackwell."""
NO_MXFP8_FROM = (12, 0)
"""Compute capability from which it is not there yet."""


def memory_option_problems(
    policy: PolicyConfig,
    shape: ModelShape,
    *,
    device: Device,
    dtype: str,
    capability: tuple[int, int] | None,
) -> Iterator[Problem]:
    """Options of `policy` that this run cannot have, and what to do.

    Args:
        shape: of the policy's model.
        device: where it runs.
        dtype: the type of its weights, "float32" or "bfloat16".
        capability: CUDA's compute capability of the GPUs; None if it is not known, or on CPU.
    """
    yield from _recompute_problems(policy, shape, device)
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload", "fp8_format"):
        if not getattr(policy, name):
            continue
        setting = f"policy.{name} = {str(getattr(policy, name)).lower()}"
        if device == "cpu":
            yield Problem(f"{setting} {_NEEDS_GPU[name]}, and this run is on the CPU: leave it out")
        elif dtype != "bfloat16":
            yield Problem(
                f"{setting} is for weights in bfloat16, and this model's are {dtype}: set "
                "model.dtype to bfloat16, or leave it out"
            )
    if policy.fp8_format is not None and device != "cpu":
        yield from _fp8_problems(policy, shape, capability)


_NEEDS_GPU = {
    "use_precision_aware_optimizer": "is Transformer Engine's, which needs GPUs",
    "optimizer_cpu_offload": "saves memory of GPUs",
    "fp8_format": "needs GPUs that multiply in FP8",
}


def _recompute_problems(
    policy: PolicyConfig, shape: ModelShape, device: Device
) -> Iterator[Problem]:
    if policy.recompute == "full":
        yield from _layers_problems(policy, shape)
    if policy.recompute != "selective":
        return
    modules = policy.recompute_modules
    for name in ("moe", "moe_act", "shared_experts"):
        if name not in modules:
            continue
        if not shape.is_moe or (name == "shared_experts" and not shape.experts.shared_size):
            what = "shared experts" if name == "shared_experts" else "experts"
            yield Problem(
                f"policy.recompute_modules: {name} matches nothing, because {shape.model_type} has "
                f"no {what}: leave it out"
            )
    whole = [name for name in ("mlp", "moe") if name in modules]
    inner = [name for name in ("moe_act", "shared_experts") if name in modules]
    if shape.is_moe and whole and inner:
        yield Problem(
            f"policy.recompute_modules: {whole[0]} computes all of a mixture of experts again, "
            f"{' and '.join(inner)} too: leave {whole[0]} or {' and '.join(inner)} out"
        )
    if "moe_act" in modules and shape.is_moe and device == "cpu":
        yield Problem(
            "policy.recompute_modules: moe_act is for experts in one kernel, which the CPU lacks: "
            "use moe"
        )
    if "mla_up_proj" in modules and shape.latent is None:
        yield Problem(
            "policy.recompute_modules: mla_up_proj matches nothing, because "
            f"{shape.model_type} has no latent attention: leave it out"
        )


def _layers_problems(policy: PolicyConfig, shape: ModelShape) -> Iterator[Problem]:
    wanted = policy.recompute_num_layers
    if wanted == 1:
        return
    chunks = policy.virtual_pipeline_size
    stages = [len(layers) // chunks for layers in rank_layers(policy, shape.num_layers)]
    if policy.recompute_method == "uniform" and any(layers % wanted for layers in stages):
        sizes = ", ".join(map(str, sorted(set(stages))))
        yield Problem(
            f"policy.recompute_num_layers = {wanted} with recompute_method uniform does not divide "
            f"the layers of each pipeline stage, {sizes}: use a number that does"
        )
    elif policy.recompute_method == "block" and wanted > max(stages):
        yield Problem(
            f"policy.recompute_num_layers = {wanted} with recompute_method block is more than the "
            f"{max(stages)} layers of a pipeline stage: use {max(stages)} or fewer"
        )


def _fp8_problems(
    policy: PolicyConfig, shape: ModelShape, capability: tuple[int, int] | None
) -> Iterator[Problem]:
    recipe, wanted = policy.fp8_recipe, FP8_CAPABILITIES[policy.fp8_recipe]
    if capability is not None and capability < wanted:
        have = [name for name, least in FP8_CAPABILITIES.items() if capability >= least]
        remedy = f"use {' or '.join(have)}" if have else "leave policy.fp8_format out"
        lack = "have no FP8" if not have else f"do not have fp8_recipe {recipe}"
        yield Problem(
            f"policy.fp8_format = {policy.fp8_format}: GPUs of compute capability "
            f"{_written(capability)} {lack}, which begins at {_written(wanted)}: {remedy}",
            only_here=True,
        )
    elif capability is not None and recipe == "mxfp8" and capability >= NO_MXFP8_FROM:
        yield Problem(
            "policy.fp8_recipe = mxfp8 is not in Transformer Engine for GPUs of compute capability "
            f"{_written(capability)} yet: use tensorwise",
            only_here=True,
        )
    multiple, tp = fp8_multiple(policy), policy.tensor_parallel_size
    sizes = {"hidden size": shape.hidden_size}
    sizes["attention heads x head size / TP"] = shape.num_heads * shape.head_dim // tp
    if shape.has_dense_mlp:
        sizes["intermediate size / TP"] = shape.intermediate_size // tp
    if shape.is_moe:
        sizes["intermediate size of experts"] = shape.experts.size
    for name, size in sizes.items():
        if size % multiple:
            yield Problem(
                f"policy.fp8_format = {policy.fp8_format} needs matrices whose sizes are multiples "
                f"of {multiple}, and {shape.model_type}'s {name} is {size}: leave it out, or use "
                "another tensor_parallel_size"
            )


def _written(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def fp8_multiple(policy: PolicyConfig) -> int:
    """What the tokens of a rank's micro-batch have to be a multiple of; 1 without FP8."""
    if policy.fp8_format is None:
        return 1
    return 32 if policy.fp8_recipe == "mxfp8" else 16
