"""Qwen1.5-MoE and Qwen2-MoE: experts beside one that all tokens go through, behind a gate."""

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import ModelFamily
from rlsys.model.families.experts import (
    BALANCING_KEYS,
    EXPERT_SIZES,
    expert_sizes,
    experts_or_dense,
    sparse_layers,
)
from rlsys.model.families.qwen2 import QKV_BIAS_KEYS


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    return expert_sizes(values, values.get("num_local_experts") or values["num_experts"]) | {
        "shared_expert_size": values["shared_expert_intermediate_size"],
        "has_shared_expert_gate": True,
    }


QWEN2_MOE = ModelFamily(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    sizes=(*EXPERT_SIZES, "decoder_sparse_step", "shared_expert_intermediate_size"),
    keys=(
        "norm_topk_prob",
        "num_experts",
        "num_local_experts",
        "mlp_only_layers",
        *BALANCING_KEYS,
    ),
    inert=QKV_BIAS_KEYS,
    defaults={"num_key_value_heads": 16},
    has_qkv_bias=True,
    layers=sparse_layers,
    mlp=experts_or_dense,
    shared_expert="shared_expert",
    own_sizes=_sizes,
)
