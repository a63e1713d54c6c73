"""Qwen1.5-MoE and Qwen2-MoE: experts beside one that all tokens go through, behind a gate."""

from rlsys.model.families.base import ModelFamily
from rlsys.model.families.experts import (
    EXPERT_SIZES,
    SPARSE_KEYS,
    experts_or_dense,
    gated_experts,
    sparse_layers,
)
from rlsys.model.families.qwen2 import QKV_BIAS_KEYS

QWEN2_MOE = ModelFamily(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    sizes=(*EXPERT_SIZES, "decoder_sparse_step", "shared_expert_intermediate_size"),
    keys=SPARSE_KEYS,
    inert=QKV_BIAS_KEYS,
    defaults={"num_key_value_heads": 16},
    constants={"has_qkv_bias": True},
    layers=sparse_layers,
    mlp=experts_or_dense,
    shared_expert="shared_expert",
    own_sizes=lambda values: {"experts": gated_experts(values)},
)
