"""Qwen3, dense."""

from rlsys.model.families.base import ModelFamily

QK_NORM_KEYS = {"qk_norm": (True,), "use_qk_norm": (True,), "qk_layernorm": (True,)}
QWEN3 = ModelFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    inert=QK_NORM_KEYS,
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    has_qk_norm=True,
)
