"""config.json: what is known to be right is accepted as published, all else is refused."""

import json

import pytest
from config_cases import EXPERTS, MODEL_SIZES

from rlsys.model.folder_check import model_notes
from rlsys.model.keys import ignored_prose
from rlsys.model.shape import read_model_shape

COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
}
QWEN2 = COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_window_layers": 21,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rope_scaling": None,
}
GEMMA3 = {key: value for key, value in COMMON.items() if key != "hidden_act"} | {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma3_text",
    "num_hidden_layers": 8,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "use_bidirectional_attention": False,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SMOLLM3 = {
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "layer_types": ["full_attention"] * 4,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0],
    "head_dim": None,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
OLMO2 = {
    "model_type": "olmo2",
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "head_dim": None,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
}
OLMO3 = OLMO2 | {
    "model_type": "olmo3",
    "architectures": ["Olmo3ForCausalLM"],
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "max_position_embeddings": 65536,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "sliding_window": 4096,
}
PHI3 = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0,
    "head_dim": None,
    "hidden_act": "silu",
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
}
PHI4_MINI = PHI3 | {
    "auto_map": PHI3["auto_map"] | {"AutoTokenizer": "Xenova/gpt-4o"},
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": [1.0] * 12, "short_factor": [1.0] * 12, "type": "longrope"},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
PUBLISHED = {
    "SmolLM3": SMOLLM3,
    "OLMo-2": OLMO2,
    "OLMo-3": OLMO3,
    "Phi-3-mini": PHI3,
    "Phi-4-mini": PHI4_MINI,
    "Qwen2.5": QWEN2,
    "Qwen2.5 base and Math": QWEN2 | {"use_mrope": False},
    "Qwen3": QWEN3,
    "Qwen3-MoE": QWEN3
    | EXPERTS
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "Gemma-3": GEMMA3,
    "Llama-2": LLAMA | {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pad_token_id": 0},
    "Llama-3.2": LLAMA
    | {
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 32,
        "rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3"},
    },
    "SmolLM2-Instruct": LLAMA
    | {
        "is_llama_config": True,
        "pad_token_id": 2,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "saved by transformers 5": {
        key: value for key, value in QWEN3.items() if key not in ("rope_theta", "rope_scaling")
    }
    | {
        "dtype": "float32",
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "a fine-tuned folder": QWEN2
    | {
        "_attn_implementation_autoset": True,
        "temperature": 0.7,
        "unsloth_fixed": True,
        "quantization_config": None,
    },
}


def shape_of(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(MODEL_SIZES | values))
    return read_model_shape(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted(tmp_path, name):
    assert shape_of(tmp_path, PUBLISHED[name]).model_type == PUBLISHED[name]["model_type"]


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (LLAMA, "partial_rotary_factor", 0.5),
        (QWEN2, "use_mrope", True),
        (LLAMA, "attention_bias", True),
        (LLAMA, "mlp_bias", True),
        (LLAMA, "bias", True),
        (LLAMA, "qkv_bias", True),
        (LLAMA, "qk_norm", True),
        (LLAMA, "sliding_window", 4096),
        (LLAMA, "hidden_act", "gelu"),
        (LLAMA, "logit_scale", 0.0625),
        (LLAMA, "attention_multiplier", 0.015625),
        (LLAMA, "embedding_multiplier", 12.0),
        (LLAMA, "residual_multiplier", 0.22),
        (LLAMA, "logits_scaling", 8.0),
        (LLAMA, "final_logit_softcapping", 30.0),
        (LLAMA, "attn_logit_softcapping", 50.0),
        (LLAMA, "query_pre_attn_scalar", 256),
        (LLAMA, "rope_interleaved", True),
        (LLAMA, "is_causal", False),
        (LLAMA, "no_rope_layers", [1, 1, 1, 0]),
        (LLAMA, "num_nextn_predict_layers", 1),
        (LLAMA, "architectures", ["LlamaForSequenceClassification"]),
        (LLAMA, "architectures", ["MistralForCausalLM"]),
        (LLAMA, "auto_map", {"AutoModelForCausalLM": "modeling_mine.Mine"}),
        (LLAMA, "per_layer_config", {"0": {"num_key_value_heads": 2}}),
        (LLAMA, "a_key_of_next_year", False),
        (LLAMA, "a_key_of_next_year", 0),
        (LLAMA, "use_sliding_window", True),
        (LLAMA | {"model_type": "mistral", "architectures": None}, "sliding_window", 0),
        (QWEN2 | {"use_sliding_window": True}, "max_window_layers", 2),
        (QWEN2, "attention_bias", False),
        (QWEN2, "qk_norm", True),
        (QWEN2, "layer_types", ["sliding_attention"] * 4),  # and no window: it is switched off
        (
            QWEN3 | {"use_sliding_window": True, "sliding_window": 4},
            "layer_types",
            ["full_attention", "sliding_attention"] * 2,
        ),
        (LLAMA, "layer_types", ["full_attention", "sliding_attention"] * 2),
        (QWEN2, "dual_chunk_attention_config", {"chunk_size": 262144}),
        (QWEN2, "attention_dropout", 0.1),
        (QWEN3, "attention_bias", True),
        (QWEN3, "qk_norm", False),
        (QWEN3, "quantization_config", {"quant_method": "awq", "bits": 4}),
        (PUBLISHED["Qwen3-MoE"], "shared_expert_intermediate_size", 512),
        (PUBLISHED["Qwen3-MoE"], "decoder_sparse_step", 5),
        (PUBLISHED["Qwen3-MoE"], "decoder_sparse_step", 0),
        (PUBLISHED["Qwen3-MoE"], "mlp_only_layers", [4]),
        (PUBLISHED["Qwen3-MoE"], "mlp_only_layers", [0, 1, 2, 3]),
        (QWEN3, "num_experts", 8),
        (GEMMA3, "hidden_activation", "gelu"),
        (GEMMA3, "hidden_act", "silu"),
        (GEMMA3, "attn_logit_softcapping", 50.0),
        (GEMMA3, "final_logit_softcapping", 30.0),
        (GEMMA3, "use_bidirectional_attention", True),
        (GEMMA3, "query_pre_attn_scalar", 0),
        (GEMMA3, "sliding_window", None),
        (GEMMA3, "sliding_window_pattern", 0),
        (GEMMA3, "rope_parameters", {"rope_type": "default", "rope_theta": 1000000.0}),
        (LLAMA, "hidden_size", 0),
        (LLAMA, "vocab_size", "384"),
        (LLAMA, "num_key_value_heads", 3),
        (LLAMA, "num_attention_heads", 12),
        (LLAMA, "head_dim", 33),
        (LLAMA, "rms_norm_eps", "1e-6"),
        (LLAMA, "rope_theta", "1000000"),
        (LLAMA, "rope_theta", 0),
        (LLAMA, "tie_word_embeddings", "false"),
        (LLAMA, "layer_types", ["full_attention"]),
    ],
)
def test_keys_that_may_change_the_model_are_refused_by_name(tmp_path, base, key, value):
    with pytest.raises(ValueError, match=key) as error:
        shape_of(tmp_path, base | {key: value})
    (line,) = str(error.value).splitlines()
    assert line.startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 1.0),
        ("logit_scale", 1.0),
        ("residual_multiplier", 1),
        ("num_nextn_predict_layers", 0),
        ("sliding_window", None),
        ("a_key_of_next_year", None),
        ("a_list_of_next_year", []),
        ("_anything_private", 7),
    ],
)
def test_values_that_change_nothing_are_accepted(tmp_path, key, value):
    shape_of(tmp_path, LLAMA | {key: value})


def test_words_for_people_are_harmless_and_known(tmp_path):
    values = LLAMA | {"comment": "x", "license": "mit"}
    shape_of(tmp_path, values)
    assert ignored_prose(values) == ["comment", "license"]
    (note,) = model_notes(tmp_path)
    assert "comment, license ignored" in note


@pytest.mark.parametrize(
    ("rope", "word"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "needs original_max_position_embeddings"),
        (YARN | {"original_max_position_embeddings": 32}, "set it to 128"),
        (YARN | {"beta_fast": 0}, "beta_fast = 0 should be a number above 0"),
        (YARN | {"apply_yarn_scaling": False}, "apply_yarn_scaling = False"),
        ({"type": "dynamic", "factor": 2.0, "alpha": 2.0}, "alpha = 2.0"),
        ({"type": "longrope", "short_factor": [1.0]}, "'longrope'"),
        ({"type": "linear", "factor": 2.0, "mscale": 0.7}, "mscale = 0.7"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ("linear", "should be a mapping"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs high_freq_factor, low_freq_factor"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "contradict"),
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rotary_embeddings_that_only_one_side_knows(tmp_path, rope, word, name):
    with pytest.raises(ValueError, match=word) as error:
        shape_of(tmp_path, LLAMA | {name: rope})
    assert f"{tmp_path / 'config.json'}: {name}" in str(error.value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2},
        YARN,
        YARN | {"attention_factor": 1.2, "truncate": False, "beta_slow": None},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
        LLAMA3_ROPE | {"rope_type": "llama3", "rope_theta": 1000000.0},
        {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 1.0},
    ],
)
def test_rotary_embeddings_that_both_sides_know(tmp_path, rope):
    shape_of(tmp_path, LLAMA | {"rope_scaling": rope})


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_yarn_gives_a_model_more_positions(tmp_path, name):
    assert shape_of(tmp_path, LLAMA).max_position_embeddings == 256
    assert shape_of(tmp_path, LLAMA | {name: YARN}).max_position_embeddings == 131072
    linear = {"rope_type": "linear", "factor": 2.0}
    assert shape_of(tmp_path, LLAMA | {name: linear}).max_position_embeddings == 256


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ],
)
def test_rotary_settings_that_contradict_each_other(tmp_path, values):
    with pytest.raises(ValueError, match="contradict each other"):
        shape_of(tmp_path, LLAMA | values)


def test_heads_with_a_head_dim_need_not_divide_the_hidden_size(tmp_path):
    values = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 32}
    assert shape_of(tmp_path, QWEN3 | values).head_dim == 32
    assert shape_of(tmp_path, QWEN2 | values).head_dim == 32


def test_all_keys_are_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="logit_scale") as error:
        shape_of(tmp_path, LLAMA | {"logit_scale": 2.0, "mlp_bias": True})
    assert "logit_scale = 2.0" in str(error.value)
    assert "mlp_bias = True" in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_a_config_that_transformers_writes_is_accepted(tmp_path, model_type):
    from transformers import AutoConfig

    sizes = MODEL_SIZES | (EXPERTS if model_type == "qwen3_moe" else {})
    del sizes["model_type"]
    AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    assert read_model_shape(tmp_path).num_layers == MODEL_SIZES["num_hidden_layers"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_sizes_that_are_left_out_are_those_of_transformers(tmp_path, model_type):
    """vLLM takes them from transformers; weights of other sizes would be looked for."""
    from transformers import AutoConfig

    values = {**MODEL_SIZES, "model_type": model_type, "num_attention_heads": 64}
    values |= EXPERTS | {"model_type": model_type} if model_type == "qwen3_moe" else {}
    values = {k: v for k, v in values.items() if k not in ("num_key_value_heads", "head_dim")}
    values |= {"hidden_size": 2048, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), read_model_shape(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", None) or 2048 // 64


MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
SWITCHED_ON = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("values", "window"),
    [
        (MISTRAL, 4096),  # transformers' and vLLM's default
        (MISTRAL | {"sliding_window": None}, None),
        (MISTRAL | {"sliding_window": 1024}, 1024),
        (QWEN2, None),
        (QWEN2 | SWITCHED_ON, None),  # max_window_layers is 21, and the model has 4
        (QWEN2 | SWITCHED_ON | {"max_window_layers": 4}, None),
        (QWEN2 | SWITCHED_ON | {"max_window_layers": 0}, 8),
        (QWEN3 | SWITCHED_ON | {"layer_types": ["sliding_attention"] * 4}, 8),
        (QWEN3 | SWITCHED_ON | {"layer_types": ["full_attention"] * 4}, None),
        (PUBLISHED["Qwen3-MoE"] | {"use_sliding_window": False, "sliding_window": 8}, None),
        (PUBLISHED["Qwen3-MoE"] | SWITCHED_ON, 8),
    ],
)
def test_windows_of_published_keys(tmp_path, values, window):
    assert {layer.window for layer in shape_of(tmp_path, values).layers} == {window}


MINISTRAL3 = {
    "model_type": "ministral3",
    "architectures": ["Ministral3ForCausalLM"],
    "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "rope_theta": 1e6},
    "sliding_window": None,
}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (SMOLLM3 | {"no_rope_layers": [1]}, "no_rope_layers = .1. should be a list"),
        (SMOLLM3 | {"no_rope_layers": [1, 1, 1, 2]}, "no_rope_layers"),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0 should be"),
        (OLMO2 | {"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        (OLMO2 | {"attention_bias": True}, "attention_bias = True is not supported"),
        (OLMO3 | {"sliding_window": None}, "sliding_window gives no window"),
        (OLMO3 | {"rope_scaling": None, "rope_parameters": YARN}, "an entry for each of"),
        (PHI3 | {"resid_pdrop": 0.1}, "resid_pdrop = 0.1 is not supported"),
        (PHI3 | {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5 should be"),
        (PHI3 | {"rope_scaling": YARN}, "'yarn' is not supported; supported are default, longrope"),
        (PHI3 | {"auto_map": {"AutoConfig": "mine.Config"}}, "auto_map"),
        (PHI4_MINI | {"original_max_position_embeddings": None}, "longrope needs original_max"),
        (MINISTRAL3 | {"rope_parameters": YARN}, "lacks llama_4_scaling_beta"),
        (MINISTRAL3 | {"rope_parameters": None}, "lacks llama_4_scaling_beta"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(tmp_path, values, word):
    with pytest.raises(ValueError, match=word):
        shape_of(tmp_path, values)


def test_layers_are_those_of_transformers(tmp_path):
    shape = shape_of(tmp_path, SMOLLM3 | {"no_rope_layers": None})
    assert [layer.rope for layer in shape.layers] == ["", "", "", None]
    shape = shape_of(tmp_path, OLMO3 | {"layer_types": None})
    assert [layer.window for layer in shape.layers] == [4096, 4096, 4096, None]
    assert [layer.rope for layer in shape.layers][2:] == ["sliding_attention", "full_attention"]


def test_gemma_3_sees_everything_in_each_sixth_layer(tmp_path):
    shape = shape_of(tmp_path, GEMMA3)
    assert [layer.window for layer in shape.layers] == [512] * 5 + [None] + [512] * 2
    kinds = {512: "sliding_attention", None: "full_attention"}
    assert [layer.rope for layer in shape.layers] == [kinds[n.window] for n in shape.layers]
    assert shape.softmax_scale == 1 / 16
    written = GEMMA3 | {"layer_types": ["full_attention", "sliding_attention"] * 4}
    assert [layer.window for layer in shape_of(tmp_path, written).layers] == [None, 512] * 4
