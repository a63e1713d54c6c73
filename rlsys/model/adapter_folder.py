"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.model.families.base import SCORE
from rlsys.model.folder import read_json
from rlsys.model.weight_files import read_header

if TYPE_CHECKING:
    from rlsys.model.lora import LoraPlan

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "exclude_modules": (None, []),
    "layers_to_transform": (None,),
    "layers_pattern": (None, []),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "velora_config": (None,),
}
"""Keys of adapter_config.json that change what an adapter computes, and what they may be."""
_BASE_CHANGES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of init_lora_weights with which PEFT changes the base model's weights."""


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model."""
    return (folder / CONFIG_FILE).is_file()


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, by the names of policy.lora's fields.

    Raises:
        ValueError: the folder holds no adapter, or one that rlsys does not train.
    """
    file = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ValueError(
            f"policy.lora.path: there is no folder {folder} on this machine. An adapter of a hub "
            "has to be downloaded first"
        )
    if not file.is_file():
        raise ValueError(
            f"policy.lora.path: {folder} has no {CONFIG_FILE}, so it is not a folder of an adapter "
            "as PEFT's save_pretrained writes it"
        )
    values = read_json(file)
    for key, allowed in _MUST_BE.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{file}: {key} = {values[key]!r} is not supported, only {allowed[0]!r}: train "
                "another adapter with policy.lora"
            )
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_BASE_CHANGES):
        raise ValueError(
            f"{file}: init_lora_weights = {init!r} changes the base model's weights, which this "
            "adapter needs: convert it with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    missing = [key for key in ("r", "lora_alpha", "target_modules") if not values.get(key)]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    return {
        "rank": values["r"],
        "alpha": values["lora_alpha"],
        "dropout": values.get("lora_dropout", 0.0),
        "rslora": bool(values.get("use_rslora", False)),
        "target_modules": values["target_modules"],
        "modules_to_save": sorted(values.get("modules_to_save") or []),
    }


def adapter_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an adapter.

    Raises:
        ValueError: there are none, or the file cannot be read.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(
            f"policy.lora.path: {folder} has no {WEIGHTS_FILE}: save the adapter as safetensors, "
            "with `save_pretrained` of PEFT"
        )
    return {name: tensor.shape for name, tensor in read_header(file).items()}


def write_adapter_config(folder: Path, plan: LoraPlan, base_model: str) -> None:
    """Write adapter_config.json, which PEFT and vLLM read."""
    values = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if plan.init == "kaiming" else plan.init,
        "lora_alpha": plan.alpha,
        "lora_dropout": plan.dropout,
        "modules_to_save": plan.modules_to_save or None,
        "peft_type": "LORA",
        "r": plan.rank,
        "target_modules": plan.target_modules,
        "task_type": "SEQ_CLS" if SCORE in plan.saved else "CAUSAL_LM",
        "use_rslora": plan.rslora,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
