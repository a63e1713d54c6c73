"""SmolLM3: some layers have no rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import LayerShape, ModelFamily


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    number, interval = values["num_hidden_layers"], values["no_rope_layer_interval"]
    turned = values.get("no_rope_layers")  # 1 where there is a rotary embedding, despite its name
    if turned is None:
        turned = [int((layer + 1) % interval != 0) for layer in range(number)]
    if not isinstance(turned, list) or len(turned) < number or not set(turned) <= {0, 1}:
        raise ValueError(
            f"no_rope_layers = {turned!r} should be a list with 1 for each of the {number} layers "
            "that has a rotary embedding, and 0 for the others"
        )
    return tuple(LayerShape(rope="" if has else None) for has in turned[:number])


SMOLLM3 = ModelFamily(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    sizes=("no_rope_layer_interval",),
    keys=("no_rope_layers",),
    defaults={
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    heads_divide_hidden=True,
    layers=_layers,
)
