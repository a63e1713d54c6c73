"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini, dense: q, k and v are one tensor, gate and up another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.model.families.base import LayerShape, ModelFamily, WeightRow, attention, gated_mlp
from rlsys.model.families.mistral import layers_with_a_window

if TYPE_CHECKING:
    from rlsys.model.shape import ModelShape


def fused_attention(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """Rows of a layer's attention."""
    qkv, *others = attention(shape, layer)
    return [qkv.in_one_tensor("self_attn.qkv_proj.weight"), *others]


def fused_mlp(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """Rows of a layer's MLP."""
    gate_and_up, down = gated_mlp(shape, layer)
    return [gate_and_up.in_one_tensor("mlp.gate_up_proj.weight"), down]


_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
"""The published code, which transformers and vLLM have taken over and do not load."""
PHI3 = ModelFamily(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    sizes=("original_max_position_embeddings",),
    inert={
        "resid_pdrop": (0,),
        "embd_pdrop": (0,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "auto_map": (_CODE, _CODE | {"AutoTokenizer": "Xenova/gpt-4o"}),
    },
    defaults={"sliding_window": None},
    heads_divide_hidden=True,
    rope_types=("default", "longrope"),
    partial_rotary=True,
    layers=layers_with_a_window,
    attention=fused_attention,
    mlp=fused_mlp,
)
