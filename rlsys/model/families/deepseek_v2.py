"""DeepSeek-V2-Lite: latent attention, and experts of softmax routers."""

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import ModelFamily
from rlsys.model.families.experts import (
    BALANCING_KEYS,
    EXPERT_SIZES,
    GROUP_SIZES,
    dense_first,
    expert_sizes,
    experts_or_dense,
    scaling_factor,
)
from rlsys.model.families.latent import LATENT_KEYS, LATENT_SIZES, latent_attention, latent_sizes


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    if (values.get("n_group") or 1) > 1:
        raise ValueError(
            f"n_group = {values['n_group']} is not supported in {values['model_type']}: it scores "
            "a group by its best expert, and megatron-core by several"
        )
    return (
        expert_sizes(values, values["n_routed_experts"])
        | latent_sizes(values)
        | {
            "routed_scaling_factor": scaling_factor(values),
            "shared_expert_size": values["n_shared_experts"] * values["moe_intermediate_size"],
        }
    )


DEEPSEEK_V2 = ModelFamily(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    sizes=(*EXPERT_SIZES, *GROUP_SIZES, *LATENT_SIZES),
    keys=(*BALANCING_KEYS, *LATENT_KEYS, "first_k_dense_replace", "routed_scaling_factor"),
    inert={
        "ep_size": (1,),
        "moe_layer_freq": (1,),
        # vLLM would normalise, transformers does not.
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy",),
    },
    defaults={
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "routed_scaling_factor": 1.0,
        "v_head_dim": 128,
    },
    router_dtype="fp32",
    rope_types=("default", "yarn"),
    layers=dense_first,
    attention=latent_attention,
    mlp=experts_or_dense,
    own_sizes=_sizes,
)
