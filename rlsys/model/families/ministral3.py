"""Ministral 3, the text model: queries far from the beginning are scaled, as in Llama 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import LayerShape, ModelFamily
from rlsys.model.families.mistral import layers_with_a_window


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for key in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if type(rope.get(key)) not in (int, float):
            raise ValueError(
                f"rope_parameters lacks {key}, a number: every ministral3 scales its queries by it"
            )
    return layers_with_a_window(values)


MINISTRAL3 = ModelFamily(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    rope_keys=("llama_4_scaling_beta", "max_position_embeddings"),
    defaults={"num_key_value_heads": 8, "head_dim": 128, "sliding_window": None},
    layers=_layers,
)
