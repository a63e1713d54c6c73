"""Whether the attention kernels that a run asks for exist: for its device, and on this machine.

Imports neither torch nor Transformer Engine.
"""

from __future__ import annotations

import os

from rlsys.model.shape import ModelShape
from rlsys.packages import installed_version
from rlsys.problems import Problem
from rlsys.types import Device

_FLASH_PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")
"""The distributions that Transformer Engine looks for, by these names and not by their modules."""
_VARIABLES = {
    "fused": "NVTE_FUSED_ATTN",
    "flash": "NVTE_FLASH_ATTN",
    "unfused": "NVTE_UNFUSED_ATTN",
}
"""Environment variables of Transformer Engine; 0 forbids a kind. megatron-core sets them by its
config, and stops at an assertion where one is set otherwise."""
_LARGEST_HEAD = 128
"""Numbers in a head for which cuDNN's gradients over packed sequences are right."""


def attention_problem(
    backend: str, *, context_parallel_size: int, device: Device, dtype: str
) -> Problem | None:
    """Why policy.attention_backend cannot be used, and what to do; None if it can.

    Args:
        backend: policy.attention_backend, which the reference has too.
        context_parallel_size: the larger of the policy's and the reference's, or one model's own.
        device: where the model runs.
        dtype: the type of its weights, "float32" or "bfloat16".
    """
    if device == "cpu":
        if backend == "auto":
            return None
        return Problem(
            f"policy.attention_backend = {backend} chooses among kernels of GPUs, and this run is "
            "on the CPU, which has one kind only: set it to auto"
        )
    if dtype == "float32" and backend in ("fused", "flash"):
        return Problem(
            f"policy.attention_backend = {backend} has no kernels for float32: set it to auto, or "
            "model.dtype to bfloat16"
        )
    if dtype == "float32" and context_parallel_size > 1:
        return Problem(
            f"context_parallel_size = {context_parallel_size} needs attention that has no kernels "
            "for float32: set model.dtype to bfloat16"
        )
    missing = missing_attention(backend)
    return None if missing is None else Problem(missing, only_here=True)


def attends_by_torch(shape: ModelShape, backend: str) -> bool:
    """Whether torch's attention takes the place of Transformer Engine's on GPUs.

    cuDNN's backward pass over packed sequences is wrong for heads of more than 128 numbers, while
    its forward pass is right: measured with cuDNN 9.14, gradients are off by 0.17 to 0.35 of their
    norm, or NaN, at 160, 192 and 256. Latent attention is right with queries of 192 and values of
    128. torch's attention over padded rows is right for all of them, and about as fast.

    Args:
        backend: policy.attention_backend.
    """
    return backend == "auto" and _is_wrong_in_cudnn(shape)


def _is_wrong_in_cudnn(shape: ModelShape) -> bool:
    values = shape.head_dim if shape.latent is None else shape.latent.v_head_dim
    return max(values, shape.head_dim - 64) > _LARGEST_HEAD


def model_attention_problem(
    shape: ModelShape,
    *,
    backend: str,
    context_parallel_size: int,
    device: Device,
    bridged: bool = False,
) -> Problem | None:
    """Why the kernels of a GPU cannot compute the model's attention; None if they can.

    Args:
        backend: policy.attention_backend.
        context_parallel_size: the model's own.
        device: where the model runs.
        bridged: mcore-bridge builds the model, with Transformer Engine's attention.
    """
    if device == "cpu":
        return None
    if context_parallel_size > 1 and shape.has_windows:
        return Problem(
            f"context_parallel_size = {context_parallel_size} with the sliding windows of "
            f"{shape.model_type} is not supported on GPUs: Transformer Engine passes keys from "
            "rank to rank, which has no windows. Set it to 1"
        )
    if _is_wrong_in_cudnn(shape) and (backend == "fused" or (backend == "auto" and bridged)):
        other = "unfused" if bridged else "auto"
        return Problem(
            f"policy.attention_backend = {backend} is cuDNN's attention, whose gradients are wrong "
            f"for heads of more than {_LARGEST_HEAD} numbers, and {shape.model_type} has heads of "
            f"{shape.head_dim}: set it to {other}"
        )
    return None


def missing_attention(backend: str) -> str | None:
    """What keeps policy.attention_backend from GPUs of this machine, and what to do."""
    if backend == "flash" and not any(map(installed_version, _FLASH_PACKAGES)):
        return (
            f"policy.attention_backend = flash needs one of {', '.join(_FLASH_PACKAGES)}, and none "
            "is installed: `pip install flash-attn --no-build-isolation`, or set it to auto, which "
            "takes cuDNN's attention"
        )
    for kind, variable in _VARIABLES.items():
        wanted = "1" if backend in ("auto", kind) else "0"
        if os.environ.get(variable, wanted) != wanted:
            return (
                f"the environment sets {variable}={os.environ[variable]}, which contradicts "
                f"policy.attention_backend = {backend}: unset it, and choose with "
                "policy.attention_backend"
            )
    return None
