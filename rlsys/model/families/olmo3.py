"""OLMo-3: an OLMo-2 with sliding windows in three of four layers, which have their own rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlsys.model.families.base import WINDOW_TYPES, LayerShape, layers_by_type
from rlsys.model.families.olmo2 import OLMO2


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    number = values["num_hidden_layers"]
    types = values.get("layer_types") or [
        WINDOW_TYPES[(layer + 1) % 4 != 0] for layer in range(number)
    ]
    layers = layers_by_type(types, values["sliding_window"])
    return tuple(replace(layer, rope=kind) for layer, kind in zip(layers, types, strict=True))


OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    inert={key: values for key, values in OLMO2.inert.items() if key != "sliding_window"},
    defaults={"sliding_window": 4096},
    layer_types=WINDOW_TYPES,
    layers=_layers,
    rope_by_layer_type=True,
)
