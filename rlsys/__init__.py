"""GRPO for language models: Ray, megatron-core, vLLM, one readable loop."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["read_run"]


def __getattr__(name: str) -> Any:
    """`read_run`, imported when somebody asks for it: commands start without it."""
    if name == "read_run":
        return importlib.import_module("rlsys.records.frames").read_run
    raise AttributeError(f"module 'rlsys' has no attribute {name!r}")
