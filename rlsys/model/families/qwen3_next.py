"""Qwen3-Next: linear and gated attention, a mixture of experts with a gated shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlsys.model.families.base import LayerShape, ModelFamily
from rlsys.model.families.experts import (
    EXPERT_SIZES,
    SPARSE_KEYS,
    experts_or_dense,
    gated_experts,
    sparse_layers,
)
from rlsys.model.families.linear import (
    HYBRID,
    LINEAR_DEFAULTS,
    LINEAR_SIZES,
    hybrid_layer_types,
    linear_or_gated,
    read_linear_attention,
)


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    kinds = hybrid_layer_types(values)
    return tuple(
        replace(layer, is_linear=kind == "linear_attention")
        for layer, kind in zip(sparse_layers(values), kinds, strict=True)
    )


def _own_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"experts": gated_experts(values), "linear": read_linear_attention(values)}


QWEN3_NEXT = ModelFamily(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    sizes=(
        *LINEAR_SIZES,
        *EXPERT_SIZES,
        "decoder_sparse_step",
        "shared_expert_intermediate_size",
    ),
    keys=SPARSE_KEYS,
    inert={"attn_output_gate": (True,), "output_gate_type": ("silu", "swish")},
    defaults={
        **LINEAR_DEFAULTS,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "norm_topk_prob": True,
    },
    constants={"has_qk_norm": True},
    has_output_gate=True,
    zero_centered_norms=True,
    partial_rotary=True,
    rope_types=("default",),
    layer_types=HYBRID,
    layers=_layers,
    attention=linear_or_gated,
    mlp=experts_or_dense,
    shared_expert="shared_expert",
    mtp_prefix="mtp.",
    own_sizes=_own_sizes,
)
