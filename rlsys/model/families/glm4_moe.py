"""GLM-4.5, 4.6 and their Air models: DeepSeek-V3's experts with grouped-query attention."""

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import ModelFamily
from rlsys.model.families.experts import (
    EXPERT_SIZES,
    GROUP_SIZES,
    SIGMOID_KEYS,
    dense_first,
    experts_or_dense,
    sigmoid_sizes,
)


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    return sigmoid_sizes(values) | {
        "has_qkv_bias": values["attention_bias"],
        "has_qk_norm": values["use_qk_norm"],
    }


GLM4_MOE = ModelFamily(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    has_classifier=False,
    sizes=(*EXPERT_SIZES, *GROUP_SIZES),
    keys=(*SIGMOID_KEYS, "attention_bias", "use_qk_norm"),
    defaults={
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
    },
    router_dtype="fp32",
    partial_rotary=True,
    layers=dense_first,
    mlp=experts_or_dense,
    own_sizes=_sizes,
)
