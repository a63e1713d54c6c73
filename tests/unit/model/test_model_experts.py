"""Mixtures of experts as they are published: accepted, and of the published size."""

import json
import re

import pytest

from rlsys.model.memory import kv_block_tokens
from rlsys.model.shape import read_model_shape

COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "ep_size": 1,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "transformers_version": "4.33.1",
    "v_head_dim": 128,
}
PUBLISHED = {
    "Qwen1.5-MoE-A2.7B": COMMON
    | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151643,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "transformers_version": "4.39.0.dev0",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "GLM-4.5-Air": COMMON
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "transformers_version": "4.54.0",
        "use_qk_norm": False,
        "vocab_size": 151552,
    },
    "DeepSeek-V2-Lite": DEEPSEEK
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
        "aux_loss_alpha": 0.001,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-06,
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_group": 1,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    "Moonlight-16B-A3B": DEEPSEEK
    | {
        "aux_loss_alpha": 0.001,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "pad_token_id": 163838,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "topk_group": 1,
        "vocab_size": 163840,
    },
    "DeepSeek-V3": DEEPSEEK
    | {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "rms_norm_eps": 1e-06,
        "rope_scaling": YARN,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "vocab_size": 129280,
    },
}
PARAMETERS = {
    "Qwen1.5-MoE-A2.7B": 14.3e9,
    "GLM-4.5-Air": 106e9,
    "DeepSeek-V2-Lite": 15.7e9,
    "Moonlight-16B-A3B": 16e9,
    "DeepSeek-V3": 671e9,
}
"""What the models' pages say, without the layers that predict further tokens."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_mixtures_are_accepted_and_counted(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    shape = read_model_shape(tmp_path)
    assert shape.num_params == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_that_transformers_writes_is_the_same_model(tmp_path, name):
    from transformers import AutoConfig

    for folder in ("published", "written"):
        (tmp_path / folder).mkdir()
    (tmp_path / "published" / "config.json").write_text(json.dumps(PUBLISHED[name]))
    AutoConfig.from_pretrained(tmp_path / "published").save_pretrained(tmp_path / "written")
    published, written = (
        read_model_shape(tmp_path / folder) for folder in ("published", "written")
    )
    assert written == published


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("GLM-4.5-Air", {"norm_topk_prob": False}, "norm_topk_prob = false"),
        ("GLM-4.5-Air", {"routed_scaling_factor": "1"}, "routed_scaling_factor = '1'"),
        ("GLM-4.5-Air", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1"),
        ("GLM-4.5-Air", {"first_k_dense_replace": 46}, "no layer has experts"),
        ("GLM-4.5-Air", {"first_k_dense_replace": 1.5}, "first_k_dense_replace = 1.5"),
        ("GLM-4.5-Air", {"n_group": 3}, "do not fit 128 experts"),
        ("GLM-4.5-Air", {"topk_group": 2}, "do not fit 128 experts"),
        ("GLM-4.5-Air", {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        # megatron-core would score a group by its best four experts, transformers by two.
        ("DeepSeek-V3", {"topk_group": 2}, "topk_group = 2 is not supported"),
        # transformers takes sigmoids whatever these say, vLLM obeys them.
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("DeepSeek-V3", {"scoring_func": None}, "scoring_func = None"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("DeepSeek-V3", {"topk_method": None}, "topk_method = None"),
        ("DeepSeek-V2-Lite", {"topk_method": "group_limited_greedy"}, "'group_limited_greedy'"),
        ("DeepSeek-V2-Lite", {"n_group": 8}, "n_group = 8 is not supported"),
        ("DeepSeek-V2-Lite", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("DeepSeek-V3", {"num_key_value_heads": 8}, "num_key_value_heads = 8"),
        ("DeepSeek-V3", {"qk_rope_head_dim": 63}, "qk_rope_head_dim = 63"),
        ("DeepSeek-V3", {"head_dim": 192}, "head_dim = 192 should be 64"),
        ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave = False"),
        ("DeepSeek-V3", {"rope_scaling": YARN | {"attention_factor": 1.3}}, "attention_factor"),
        ("DeepSeek-V3", {"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        ("DeepSeek-V3", {"rope_scaling": YARN | {"mscale_all_dim": 0}}, "mscale_all_dim"),
        ("DeepSeek-V3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ("DeepSeek-V3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("DeepSeek-V3", {"kv_lora_rank": None}, "lacks 'kv_lora_rank'"),
        ("DeepSeek-V3", {"quantization_config": {"quant_method": "fp8"}}, "FineGrainedFP8Config"),
        ("Qwen1.5-MoE-A2.7B", {"shared_expert_intermediate_size": 0}, "should be a whole number"),
        ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("Qwen1.5-MoE-A2.7B", {"mlp_only_layers": 3}, "mlp_only_layers = 3"),
    ],
)
def test_what_policy_and_engine_would_compute_otherwise_is_refused(tmp_path, name, change, words):
    values = {key: value for key, value in (PUBLISHED[name] | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(words)):
        read_model_shape(tmp_path)


def test_a_kv_cache_of_latent_attention_holds_one_vector_per_layer_on_each_rank(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["DeepSeek-V3"]))
    shape = read_model_shape(tmp_path)
    assert shape.kv_elements_per_token(1) == shape.kv_elements_per_token(8) == 61 * (512 + 64)
    assert (kv_block_tokens(shape, "cpu"), kv_block_tokens(shape, "cuda")) == (16, 16)


def test_the_layers_of_a_model_have_experts_where_it_says_so(tmp_path):
    values = PUBLISHED["Qwen1.5-MoE-A2.7B"] | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 6}))
    layers = read_model_shape(tmp_path).layers
    assert [layer.has_experts for layer in layers] == [False, True, False, False, False, True]
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["DeepSeek-V3"]))
    layers = read_model_shape(tmp_path).layers
    assert [layer.has_experts for layer in layers] == [False] * 3 + [True] * 58
