"""Qwen2 and Qwen2.5, dense."""

from rlsys.model.families.base import ModelFamily

QWEN2 = ModelFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    inert={"attention_bias": (True,), "qkv_bias": (True,), "bias": (True,)},
    defaults={"num_key_value_heads": 32},
    has_qkv_bias=True,
)
