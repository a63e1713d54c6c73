"""Qwen3.5, the dense text models: linear attention in three of four layers, gated in the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import LayerShape, ModelFamily
from rlsys.model.families.linear import (
    HYBRID,
    LINEAR_DEFAULTS,
    LINEAR_SIZES,
    hybrid_layer_types,
    linear_in_parts,
    read_linear_attention,
)


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    return tuple(
        LayerShape(is_linear=kind == "linear_attention") for kind in hybrid_layer_types(values)
    )


QWEN3_5 = ModelFamily(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    own_classifier="Qwen3_5TextForSequenceClassification",
    sizes=LINEAR_SIZES,
    inert={
        "attn_output_gate": (True,),
        "output_gate_type": ("silu", "swish"),
        # In which type vLLM keeps states; the policy computes them in float32.
        "mamba_ssm_dtype": ("float32", "bfloat16"),
        # Layers that predict further tokens are neither trained nor sampled with.
        "mtp_num_hidden_layers": (0, 1),
        "mtp_use_dedicated_embeddings": (False,),
    },
    defaults={**LINEAR_DEFAULTS, "num_key_value_heads": 4, "head_dim": 256},
    constants={"has_qk_norm": True},
    has_output_gate=True,
    zero_centered_norms=True,
    partial_rotary=True,
    rope_types=("default",),
    # Positions of images; a text has equal positions in all sections.
    rope_keys=("mrope_section", "mrope_interleaved"),
    layer_types=HYBRID,
    layers=_layers,
    attention=linear_in_parts,
    mtp_prefix="mtp.",
    own_sizes=lambda values: {"linear": read_linear_attention(values)},
)
