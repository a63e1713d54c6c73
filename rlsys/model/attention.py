"""Whether the policy's attention can be had, told before a GPU is taken and again by the engine.

Imports neither torch nor Transformer Engine.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsys.config import PolicyConfig
    from rlsys.types import Device

_FLASH_PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")
"""The distributions that Transformer Engine looks for, by these names and not by their modules."""
_VARIABLES = {
    "fused": "NVTE_FUSED_ATTN",
    "flash": "NVTE_FLASH_ATTN",
    "unfused": "NVTE_UNFUSED_ATTN",
}
"""What Transformer Engine is told by: 0 forbids a kind. megatron-core sets them by its config, and
stops at an assertion where one is set otherwise."""


def unsupported_attention(
    policy: PolicyConfig,
    *,
    context_parallel_size: int,
    device: Device,
    dtype: str,
) -> str | None:
    """Why no machine has the attention that `policy` asks for, and what to do; None if some do.

    Args:
        policy: its attention_backend, which is the reference's too.
        context_parallel_size: of the policy, or of the reference.
        device: that it runs on.
        dtype: of the weights, "float32" or "bfloat16".
    """
    backend = policy.attention_backend
    if device == "cpu" and backend != "auto":
        return (
            f"policy.attention_backend = {backend} chooses among kernels of GPUs, and this run is "
            "on the CPU, which has one kind only: set it to auto"
        )
    if device == "cpu" or dtype != "float32":
        return None
    if backend in ("fused", "flash"):
        return (
            f"policy.attention_backend = {backend} has no kernels for float32: set it to auto, or "
            "model.dtype to bfloat16"
        )
    if context_parallel_size > 1:
        return (
            f"context_parallel_size = {context_parallel_size} needs attention that has no kernels "
            "for float32: set model.dtype to bfloat16"
        )
    return None


def missing_attention(backend: str) -> str | None:
    """What keeps policy.attention_backend from GPUs of this machine, and what to do."""
    if backend == "flash" and not any(map(_is_installed, _FLASH_PACKAGES)):
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


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
