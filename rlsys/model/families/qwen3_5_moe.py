"""Qwen3.5-MoE, the text models: a Qwen3.5 with experts and a gated shared one in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlsys.model.families.base import LayerShape
from rlsys.model.families.experts import (
    BALANCING_KEYS,
    EXPERT_SIZES,
    experts_or_dense,
    gated_experts,
)
from rlsys.model.families.qwen3_5 import QWEN3_5


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    return tuple(replace(layer, has_experts=True) for layer in QWEN3_5.layers(values))


def _own_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    # The weights of a token's experts are always normalised; config.json has no key for that.
    experts = gated_experts({**values, "norm_topk_prob": True})
    return QWEN3_5.own_sizes(values) | {"experts": experts}


QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    has_classifier=False,
    sizes=(*QWEN3_5.sizes, *EXPERT_SIZES, "shared_expert_intermediate_size"),
    keys=("num_experts", "num_local_experts", *BALANCING_KEYS),
    inert={**QWEN3_5.inert, "norm_topk_prob": (True,)},
    # There are no layers without experts, for which it would be the size.
    defaults={**QWEN3_5.defaults, "num_key_value_heads": 2, "intermediate_size": 1},
    layers=_layers,
    mlp=experts_or_dense,
    shared_expert="shared_expert",
    own_sizes=_own_sizes,
)
