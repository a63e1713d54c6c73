"""Whether rollout engines sample with the policy's LoRA adapter, or with merged weights."""

from __future__ import annotations

from pathlib import Path

from rlsys.config import Config
from rlsys.model.adapter_folder import adapter_settings
from rlsys.model.shape import ModelShape
from rlsys.types import Device

SLOT_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes that vLLM has for an adapter (`MaxLoRARanks` in vllm/config/lora.py)."""


def with_stored_settings(config: Config) -> Config:
    """`config` with the rank and the other settings of the adapter in policy.lora.path.

    Hosts of rollout engines may not have that folder.

    Raises:
        ValueError: the folder holds no adapter that rlsys trains.
    """
    lora = config.policy.lora
    if lora is None or lora.path is None:
        return config
    stored = adapter_settings(Path(lora.path))
    if "dropout" in lora.model_fields_set:
        del stored["dropout"]  # the one setting that a run may change
    lora = lora.model_copy(update=stored)
    return config.model_copy(update={"policy": config.policy.model_copy(update={"lora": lora})})


def syncs_adapter(config: Config, shape: ModelShape, device: Device) -> bool:
    """weight_sync.lora, decided: whether engines get the adapter beside the base."""
    if config.policy.lora is None or config.weight_sync.lora == "merged":
        return False
    if config.weight_sync.lora == "adapter":
        return True
    return device == "cuda" and adapter_obstacle(config, shape, device) is None


def adapter_obstacle(config: Config, shape: ModelShape, device: Device) -> str | None:
    """Why vLLM cannot sample with the adapter of `policy.lora`; None if it can."""
    lora = config.policy.lora
    assert lora is not None
    if lora.modules_to_save:
        names = ", ".join(lora.modules_to_save)
        return f"vLLM takes no whole modules, and policy.lora.modules_to_save has {names}"
    if lora.rank > SLOT_RANKS[-1]:
        return f"vLLM takes ranks up to {SLOT_RANKS[-1]}, and policy.lora.rank is {lora.rank}"
    if shape.is_moe:
        return "vLLM runs a model with experts with other kernels then, which rlsys does not use"
    if shape.latent is not None:
        return "vLLM reads copies of kv_b_proj in latent attention, which no adapter changes"
    if shape.linear is not None:
        return "vLLM fuses projections of linear attention in another way than adapters name them"
    if device == "cuda" and config.model_dtype(on_cpu=False) == "float32":
        return "vLLM's LoRA kernels on GPUs compute in bfloat16, and model.dtype is float32"
    return None


def describe_adapter_sync(config: Config, shape: ModelShape, device: Device) -> str:
    """What rollout engines get of a policy with LoRA, and why."""
    if syncs_adapter(config, shape, device):
        return "get the base once, then the LoRA adapter alone (weight_sync.lora)"
    text = "get base + LoRA adapter merged into one model (weight_sync.lora)"
    if config.weight_sync.lora == "merged":
        return text
    slow = "on CPU vLLM computes adapters slowly, token by token"
    return f"{text}: {adapter_obstacle(config, shape, device) or slow}"
