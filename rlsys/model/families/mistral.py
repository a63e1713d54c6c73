"""Mistral, dense: its tensors are named as Llama's. Version 0.1 has sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import LayerShape, ModelFamily


def layers_with_a_window(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    """config.json -> dense layers that are all alike, with the window that it names."""
    return (LayerShape(window=values["sliding_window"]),) * values["num_hidden_layers"]


MISTRAL = ModelFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    layers=layers_with_a_window,
)
