"""Gemma 3, text: the models of model_type gemma3_text, and those that are cut out of gemma3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.model.families.base import WINDOW_TYPES, LayerShape, ModelFamily, layers_by_type


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    """Layers by layer_types, or with a window in all but each sliding_window_pattern-th."""
    pattern = values["sliding_window_pattern"]
    kinds = values.get("layer_types") or [
        "sliding_attention" if number % pattern else "full_attention"
        for number in range(1, values["num_hidden_layers"] + 1)
    ]
    return layers_by_type(kinds, values["sliding_window"], rope_by_type=True)


def _own_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    scalar = values["query_pre_attn_scalar"]
    if type(scalar) not in (int, float) or scalar <= 0:
        raise ValueError(f"query_pre_attn_scalar = {scalar!r} should be a number above 0")
    return {"softmax_scale": scalar**-0.5}


GEMMA3 = ModelFamily(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    own_classifier="Gemma3TextForSequenceClassification",
    sizes=("sliding_window_pattern",),
    keys=("query_pre_attn_scalar", "rope_local_base_freq"),
    inert={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "hidden_act": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False,),
        # vLLM leaves the first out, and the policy both; Gemma 3 as published has neither.
        "attn_logit_softcapping": (),
        "final_logit_softcapping": (),
    },
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    heads_divide_hidden=True,
    constants={"has_qk_norm": True},
    rope_by_layer_type=True,
    layer_types=WINDOW_TYPES,
    norms="sandwich",
    zero_centered_norms=True,
    scaled_embeddings=True,
    activation="gelu_tanh",
    layers=_layers,
    own_sizes=_own_sizes,
)
