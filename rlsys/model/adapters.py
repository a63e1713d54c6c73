"""Whether rollout engines sample with the policy's LoRA adapter, or with merged weights.

And what the adapter takes of an engine's memory.
"""

from __future__ import annotations

from pathlib import Path

from rlsys.config import Config, LoraConfig
from rlsys.config.schema import AnyConfig
from rlsys.model.adapter_folder import adapter_settings
from rlsys.model.lora import adapter_table, plan_lora
from rlsys.model.shape import ModelShape
from rlsys.types import Device

SLOT_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes that vLLM has for an adapter (`MaxLoRARanks` in vllm/config/lora.py)."""


def with_stored_settings(config: AnyConfig) -> AnyConfig:
    """`config` with the rank and the other settings of the adapter in policy.lora.path.

    Whoever reads policy.lora from a config needs them, and hosts of rollout engines may not have
    that folder. `plan_lora` looks into it itself.

    Raises:
        ValueError: the folder holds no adapter that rlsys trains.
    """
    lora = config.policy.lora
    if lora is None or lora.path is None:
        return config
    stored = adapter_settings(Path(lora.path))
    # A run may change the dropout alone; `plan_lora` refuses other settings.
    own = {name: value for name, value in stored.items() if name not in lora.model_fields_set}
    lora = lora.model_copy(update=own)
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


def slot_rank(lora: LoraConfig) -> int:
    """Rank of the place that an engine has for an adapter: vLLM's next larger one."""
    return next(size for size in SLOT_RANKS if size >= lora.rank)


def slot_numbers(shape: ModelShape, rank: int, tensor_parallel_size: int) -> int:
    """Numbers of that place on one of an engine's ranks.

    vLLM has A and B of every linear layer, whatever the adapter has, and of embedding and head,
    which its ranks do not share. Some models have no place for the last two.
    """
    rows = adapter_table(shape, plan_lora(LoraConfig(rank=rank), shape))
    linear = sum(
        row.num_params // (1 if row.tp_axis is None else tensor_parallel_size) for row in rows
    )
    return linear + 2 * rank * (shape.vocab_size + shape.hidden_size)


def adapter_numbers(config: Config, shape: ModelShape, device: Device) -> int:
    """Numbers that engines hold for the policy's adapter, on each rank; 0 if they get none.

    Beside its place in the model, vLLM keeps the adapter, whole, and the one that comes.

    Args:
        config: `with_stored_settings`.
    """
    lora = config.policy.lora
    if lora is None or not syncs_adapter(config, shape, device):
        return 0
    own = adapter_table(shape, plan_lora(lora.model_copy(update={"path": None}), shape))
    slot = slot_numbers(shape, slot_rank(lora), config.rollout.tensor_parallel_size)
    return slot + 2 * sum(row.num_params for row in own)
