"""DeepSeek-V2 and V2-Lite: latent attention, and experts of softmax routers."""

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import ModelFamily
from rlsys.model.families.experts import (
    BALANCING_KEYS,
    EXPERT_SIZES,
    GROUP_SIZES,
    dense_first,
    experts_or_dense,
    grouped_experts,
)
from rlsys.model.families.latent import LATENT_KEYS, LATENT_SIZES, latent_attention, latent_sizes

_METHODS = ("greedy", "group_limited_greedy")


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    method, groups = values["topk_method"], values.get("n_group") or 1
    if method not in _METHODS:
        raise ValueError(f"topk_method = {method!r} is not supported: it may be {_METHODS}")
    if (groups > 1) != (method == "group_limited_greedy"):
        raise ValueError(
            f"topk_method = {method!r} with n_group = {groups} is not supported: transformers goes "
            "by the first and vLLM by the second. Groups need 'group_limited_greedy'"
        )
    return latent_sizes(values) | {"experts": grouped_experts(values, best_of_group=1)}


DEEPSEEK_V2 = ModelFamily(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    sizes=(*EXPERT_SIZES, *GROUP_SIZES, *LATENT_SIZES),
    keys=(
        *BALANCING_KEYS,
        *LATENT_KEYS,
        "first_k_dense_replace",
        "routed_scaling_factor",
        "topk_method",
    ),
    inert={
        "ep_size": (1,),
        "moe_layer_freq": (1,),
        # vLLM would normalise, transformers does not.
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
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
        "topk_method": "greedy",
        "v_head_dim": 128,
    },
    router_dtype="fp32",
    rope_types=("default", "yarn"),
    layers=dense_first,
    attention=latent_attention,
    mlp=experts_or_dense,
    own_sizes=_sizes,
)
