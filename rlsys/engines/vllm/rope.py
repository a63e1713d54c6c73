"""Rotary embeddings as transformers computes them, said to vLLM in the keys that it reads."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vllm.platforms import current_platform

from rlsys.model.families.base import WINDOW_TYPES


def rope_overrides(hf: PretrainedConfig) -> dict[str, Any]:
    """What of a model's config vLLM has to read in other words; {} for most models."""
    parameters = hf.rope_parameters or {}
    if hasattr(hf, "kv_lora_rank"):
        return _for_latent_attention(hf, parameters)
    if any(key in parameters for key in WINDOW_TYPES):
        said = {kind: _for_vllm(hf, entry, kind) for kind, entry in parameters.items()}
        changes = any(said[kind] is not entry for kind, entry in parameters.items())
    else:
        said = _for_vllm(hf, parameters, None)
        changes = said is not parameters
    overrides = {"rope_parameters": said} if changes else {}
    beta = parameters.get("llama_4_scaling_beta")
    if beta is not None:
        length = parameters["original_max_position_embeddings"]
        overrides["llama_4_scaling"] = {"beta": beta, "original_max_position_embeddings": length}
    return overrides


def _for_latent_attention(hf: PretrainedConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """YaRN's factors are transformers', but on CPU the plain kernel turns wrong numbers.

    It is right for queries that are flat, and queries of latent attention are not. YaRN does
    without that kernel, and with a factor of 1 has the plain frequencies.
    """
    if not current_platform.is_cpu() or rope["rope_type"] != "default":
        return {}
    yarn = {"rope_type": "yarn", "factor": 1.0}
    length = {"original_max_position_embeddings": hf.max_position_embeddings}
    return {"rope_parameters": rope | yarn | length}


def _for_vllm(hf: PretrainedConfig, rope: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """One rotary embedding, with the keys that differ between transformers and vLLM's versions."""
    rope_type = rope.get("rope_type")
    if rope_type not in ("linear", "yarn", "longrope"):
        return rope
    rope = {key: value for key, value in rope.items() if value is not None}
    if rope_type == "linear":  # vLLM takes a whole number for a list of factors
        return rope | {"factor": float(rope["factor"])}
    _, factor = ROPE_INIT_FUNCTIONS[rope_type](hf, layer_type=kind)
    if rope_type == "longrope":  # transformers' attention_factor, of which vLLM knows these names
        return rope | {"short_mscale": factor, "long_mscale": factor}
    # vLLM 0.26 multiplies its own factor by attn_factor, and skips the other names.
    own = 0.1 * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
    return rope | {"attention_factor": factor, "attn_factor": factor / own}
