"""Qwen3-MoE: a mixture of experts in each layer, or in some; without shared experts."""

from rlsys.model.families.base import ModelFamily
from rlsys.model.families.experts import (
    EXPERT_SIZES,
    SPARSE_KEYS,
    experts_or_dense,
    sparse_experts,
    sparse_layers,
)
from rlsys.model.families.qwen2 import WINDOW_KEYS, window_of
from rlsys.model.families.qwen3 import QK_NORM_KEYS

QWEN3_MOE = ModelFamily(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sizes=(*EXPERT_SIZES, "decoder_sparse_step"),
    keys=SPARSE_KEYS,
    inert=WINDOW_KEYS | QK_NORM_KEYS,
    defaults={"num_key_value_heads": 4, "sliding_window": 4096},
    constants={"has_qk_norm": True},
    layers=lambda values: sparse_layers(values, window_of(values)),
    mlp=experts_or_dense,
    own_sizes=lambda values: {"experts": sparse_experts(values)},
)
