"""Ministral 8B: a Mistral with sliding windows in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import WINDOW_TYPES, LayerShape, ModelFamily, layers_by_type


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    window = values["sliding_window"]
    types = values.get("layer_types") or [WINDOW_TYPES[window is not None]] * int(
        values["num_hidden_layers"]
    )
    return layers_by_type(types, window)


MINISTRAL = ModelFamily(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    layer_types=WINDOW_TYPES,
    layers=_layers,
)
