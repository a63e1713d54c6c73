"""DeepSeek-V3, R1 and Moonlight: latent attention, and experts of sigmoid routers."""

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
from rlsys.model.families.latent import LATENT_KEYS, LATENT_SIZES, latent_attention, latent_sizes

_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in _ROUTER.items():
        if values.get(key) != value:
            raise ValueError(
                f"{key} = {values.get(key)!r} should be {value!r}: transformers computes that "
                "whatever config.json says, and vLLM something else"
            )
    if values.get("rope_interleave", True) is not True:
        raise ValueError("rope_interleave = null is false to transformers: leave it out")
    return sigmoid_sizes(values) | latent_sizes(values)


DEEPSEEK_V3 = ModelFamily(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    sizes=(*EXPERT_SIZES, *GROUP_SIZES, *LATENT_SIZES),
    keys=(*SIGMOID_KEYS, *LATENT_KEYS, *_ROUTER),
    inert={"ep_size": (1,), "moe_layer_freq": (1,), "rope_interleave": (True,)},
    defaults={
        "first_k_dense_replace": 3,
        "n_group": 8,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "topk_group": 4,
    },
    router_dtype="fp32",
    rope_types=("default", "yarn"),
    layers=dense_first,
    attention=latent_attention,
    mlp=experts_or_dense,
    own_sizes=_sizes,
)
