"""Qwen2 and Qwen2.5, dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import WINDOW_TYPES, LayerShape, ModelFamily, layers_by_type

QKV_BIAS_KEYS = {"attention_bias": (True,), "qkv_bias": (True,), "bias": (True,)}
WINDOW_KEYS = {"use_sliding_window": (True, False)}
WINDOW_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}


def window_of(values: Mapping[str, Any]) -> int | None:
    """The sliding window, which counts where use_sliding_window says so."""
    return values["sliding_window"] if values.get("use_sliding_window") else None


def windowed_layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    """config.json -> dense layers, with windows by layer_types or from max_window_layers on.

    Raises:
        ValueError: some layers have windows and others not.
    """
    window, types = window_of(values), values.get("layer_types")
    if not types:
        first = values["num_hidden_layers"] if window is None else values["max_window_layers"]
        types = [WINDOW_TYPES[n >= first] for n in range(values["num_hidden_layers"])]
    layers = layers_by_type(types, window)
    if len(set(layers)) > 1:
        key = "layer_types" if values.get("layer_types") else "max_window_layers"
        raise ValueError(
            f"use_sliding_window with {key} = {values[key]} gives windows to some layers of "
            f"{len(layers)}: vLLM has them in all layers of a {values['model_type']} model or in "
            "none"
        )
    return layers


QWEN2 = ModelFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    inert=WINDOW_KEYS | QKV_BIAS_KEYS,
    defaults=WINDOW_DEFAULTS | {"num_key_value_heads": 32},
    constants={"has_qkv_bias": True},
    layer_types=WINDOW_TYPES,
    layers=windowed_layers,
)
