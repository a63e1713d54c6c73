"""Qwen3, dense."""

from rlsys.model.families.base import WINDOW_TYPES, ModelFamily
from rlsys.model.families.qwen2 import (
    WINDOW_DEFAULTS,
    WINDOW_KEYS,
    windowed_layers,
)

QK_NORM_KEYS = {"qk_norm": (True,), "use_qk_norm": (True,), "qk_layernorm": (True,)}
QWEN3 = ModelFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    inert=WINDOW_KEYS | QK_NORM_KEYS,
    defaults=WINDOW_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
    constants={"has_qk_norm": True},
    layer_types=WINDOW_TYPES,
    layers=windowed_layers,
)
