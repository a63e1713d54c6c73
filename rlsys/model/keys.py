"""The keys of a model's config.json that rlsys knows to be right; a run with others is refused.

transformers, vLLM and the policy each obey some keys and skip the rest without a word. A key that
only one of them obeys makes policy and rollout engine compute different models. The keys here are
those that families share; `ModelFamily` has further ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlsys.model.families import FAMILIES
from rlsys.model.other_kinds import quantization_method, quantized_problem
from rlsys.model.rope import partial_problems, rope_problems


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
MOST, MOST_LAYERS = 2**31 - 1, 10_000
"""Far above every size of a model: a damaged file must not make rlsys count for hours."""
_NULLABLE = _names("""
    head_dim n_group n_shared_experts num_key_value_heads original_max_position_embeddings
    q_lora_rank sliding_window topk_group
""")
"""Sizes that may be null: what they are the size of is then not there, or follows from others."""
_IMPLEMENTED = _names("""
    model_type rms_norm_eps rope_theta tie_word_embeddings architectures layer_types
    rope_scaling rope_parameters
""").union(_SIZES)
# max_window_layers counts in families that read it, with use_sliding_window; pretraining_tp says
# how pretraining split matrices.
_BOOKKEEPING = _names("""
    attn_implementation bos_token_id cache_implementation dtype eos_token_id finetuning_task
    gradient_checkpointing id2label initializer_range is_llama_config label2id max_window_layers
    name_or_path num_labels output_attentions output_hidden_states pad_token_id prefix
    pretraining_tp problem_type return_dict return_dict_in_generate sep_token_id
    task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version
    use_bfloat16 use_cache
""")
"""Keys that describe files, training or defaults of a library, and leave the forward pass alone."""
_GENERATION = _names("""
    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty suppress_tokens temperature top_k top_p typical_p
""")
"""Defaults of `generate()` in older transformers; the run's own sampling settings replace them."""
_PROSE = _names("author authors comment comments description license note notes")
"""Keys with notes for people: ignored, and named once."""
_INERT: dict[str, tuple[Any, ...]] = {
    "activation": ("silu", "swiglu"),
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "attention_multiplier": (),
    "bias": (False,),
    "chunk_size_feed_forward": (0,),
    "decoder_sparse_step": (1,),
    "embedding_multiplier": (1,),
    "hidden_act": ("silu", "swish"),
    "hidden_dropout": (0,),
    "is_causal": (True,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "num_nextn_predict_layers": (0,),
    "position_embedding_type": ("rope", "absolute"),  # transformers' old default for all models
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "shared_expert_intermediate_size": (0,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
"""Key -> the values with which it changes nothing. Null and empty change nothing anywhere."""
_REMEDY = (
    "policy and rollout engine could compute different models. Delete the key from config.json if "
    "it changes nothing, or use another model"
)


def key_problems(values: dict[str, Any], *, is_classifier: bool = False) -> Iterator[str]:
    """Keys and values in the config.json of a supported model_type that could be wrong.

    `is_classifier`: the run gives the model a score head, so it may have one already.
    """
    model_type = values["model_type"]
    family = FAMILIES[model_type]
    named = values.get("architectures")
    if is_classifier and not family.has_classifier:
        yield (
            f"transformers has no sequence classifier of model_type {model_type!r}, so nothing "
            "could read what the run saves: use another model"
        )
        return
    allowed = [family.architecture, *([family.classifier] if is_classifier else [])]
    if named not in (None, [], *([name] for name in allowed)):
        yield (
            f"architectures = {named!r}, and vLLM goes by it: a language model of type "
            f"{model_type} has [{family.architecture!r}]"
        )
    own = _names(" ".join((*family.keys, *family.sizes)))
    inert = {key: kept for key, kept in (_INERT | dict(family.inert)).items() if key not in own}
    known = _IMPLEMENTED.union(own, _BOOKKEEPING, _GENERATION, _PROSE)
    for key, value in values.items():
        if key.startswith("_") or value is None or value in ([], {}, ""):
            continue
        if key in inert:
            if value not in inert[key]:
                yield f"{model_type} with {key} = {value!r} is not supported{_allowed(inert[key])}"
        elif key == "partial_rotary_factor":
            yield from partial_problems(key, value, family)
        elif key == "quantization_config":
            yield f"quantization_config: {quantized_problem(quantization_method(value))}"
        elif key == "auto_map" and key not in own:
            yield (
                f"auto_map = {value!r}: the model brings code of its own, which rlsys does not "
                f"run; {_REMEDY}"
            )
        elif key not in known:
            yield f"{key} = {value!r} is not known to rlsys; {_REMEDY}"
    yield from _size_problems(values)
    yield from _layer_problems(values)
    yield from rope_problems(values, family, _REMEDY)


def ignored_prose(values: dict[str, Any]) -> list[str]:
    """Keys of config.json that people wrote for people."""
    return sorted(_PROSE & values.keys())


def _allowed(allowed: tuple[Any, ...]) -> str:
    return f": it may be {' or '.join(map(repr, allowed)) or 'null'}"


def _size_problems(values: dict[str, Any]) -> Iterator[str]:
    family = FAMILIES[values["model_type"]]
    for key in (*_SIZES, *family.sizes):
        if key not in values or (values[key] is None and key in _NULLABLE):
            continue
        value = values[key]
        if key == "sliding_window" and value == 0 and values.get("use_sliding_window") is False:
            continue  # transformers writes it where windows are switched off
        most = MOST_LAYERS if key == "num_hidden_layers" else MOST
        if type(value) is not int or not 1 <= value <= most:
            limit = "of at least 1" if type(value) is not int or value < 1 else f"up to {most:,}"
            yield f"{key} = {value!r:.40} should be a whole number {limit}"
            return
    yield from _head_problems(values)
    for key in ("rms_norm_eps", "rope_theta"):
        value = values.get(key, 1.0)
        if value is not None and (type(value) not in (int, float) or not value > 0):
            yield f"{key} = {value!r} should be a number above 0"
    if not isinstance(values.get("tie_word_embeddings", False), bool):
        yield f"tie_word_embeddings = {values['tie_word_embeddings']!r} should be true or false"


def _head_problems(values: dict[str, Any]) -> Iterator[str]:
    family, hidden = FAMILIES[values["model_type"]], values.get("hidden_size")
    heads, groups = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads and groups and heads % groups:
        yield f"num_key_value_heads = {groups} does not divide num_attention_heads = {heads}"
    head_dim = values.get("head_dim", family.defaults.get("head_dim"))
    must_divide = family.heads_divide_hidden or head_dim is None
    if must_divide and hidden and heads and hidden % heads:
        yield f"num_attention_heads = {heads} does not divide hidden_size = {hidden}"
    elif head_dim is not None and head_dim % 2:
        yield f"head_dim = {head_dim} should be even: rotary embeddings turn pairs of numbers"


def _layer_problems(values: dict[str, Any]) -> Iterator[str]:
    """Layers of a kind that the family does not have."""
    model_type = values["model_type"]
    allowed = FAMILIES[model_type].layer_types
    layer_types = values.get("layer_types") or []
    kinds = layer_types if isinstance(layer_types, list) else [layer_types]
    others = sorted({repr(kind) for kind in kinds if kind not in allowed})
    if others:
        yield (
            f"{model_type} with {', '.join(others)} in layer_types is not supported: each layer "
            f"has to be {' or '.join(map(repr, allowed))}"
        )
    num_layers = values.get("num_hidden_layers")
    if kinds and not others and len(kinds) != num_layers:
        yield f"layer_types has {len(kinds)} entries for num_hidden_layers = {num_layers}"
