"""Whether policy.attention_backend can be had, told before a GPU is taken and again by the engine.

Imports neither torch nor Transformer Engine.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

_FLASH_PACKAGES = ("flash_attn", "flash_attn_3", "flash_attn_interface", "flash_attn_4")
_VARIABLES = {
    "fused": "NVTE_FUSED_ATTN",
    "flash": "NVTE_FLASH_ATTN",
    "unfused": "NVTE_UNFUSED_ATTN",
}
"""What Transformer Engine is told by: 0 forbids a kind. megatron-core sets them by its config, and
stops at an assertion where one is set otherwise."""


def attention_backend_problem(backend: str, *, device: Literal["cpu", "cuda"]) -> str | None:
    """What keeps attention of kind `backend` from running on this machine, and what to do."""
    if device == "cpu":
        if backend == "auto":
            return None
        return (
            f"policy.attention_backend = {backend} chooses among kernels of GPUs, and this run is "
            "on the CPU, which has one kind only: set it to auto"
        )
    if backend == "flash" and not any(map(importlib.util.find_spec, _FLASH_PACKAGES)):
        return (
            "policy.attention_backend = flash needs the package flash-attn, which is not "
            "installed: `pip install flash-attn --no-build-isolation`, or set it to auto, which "
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
