"""Mixtures of experts as they are published: accepted, and of the published size."""

import json
import re

import pytest
from published_models import MIXTURES, PARAMETERS, YARN

from rlsys.model.memory import kv_block_tokens
from rlsys.model.shape import read_model_shape


@pytest.mark.parametrize("name", MIXTURES)
def test_published_mixtures_are_accepted_and_counted(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(MIXTURES[name]))
    shape = read_model_shape(tmp_path)
    assert shape.num_params == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_config_that_transformers_writes_is_the_same_model(tmp_path, name):
    from transformers import AutoConfig

    for folder in ("published", "written"):
        (tmp_path / folder).mkdir()
    (tmp_path / "published" / "config.json").write_text(json.dumps(MIXTURES[name]))
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
        # transformers takes sigmoids whatever these say, vLLM obeys them.
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("DeepSeek-V3", {"scoring_func": None}, "scoring_func = None"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("DeepSeek-V3", {"topk_method": None}, "topk_method = None"),
        ("DeepSeek-V2-Lite", {"topk_method": "group_limited_greedy"}, "'group_limited_greedy'"),
        ("DeepSeek-V2-Lite", {"n_group": 8}, "'greedy' with n_group = 8 is not supported"),
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
    values = {key: value for key, value in (MIXTURES[name] | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(words)):
        read_model_shape(tmp_path)


def test_a_kv_cache_of_latent_attention_holds_one_vector_per_layer_on_each_rank(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTURES["DeepSeek-V3"]))
    shape = read_model_shape(tmp_path)
    assert shape.kv_elements_per_token(1) == shape.kv_elements_per_token(8) == 61 * (512 + 64)
    assert (kv_block_tokens(shape, "cpu"), kv_block_tokens(shape, "cuda")) == (16, 16)


def test_the_layers_of_a_model_have_experts_where_it_says_so(tmp_path):
    values = MIXTURES["Qwen1.5-MoE-A2.7B"] | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 6}))
    layers = read_model_shape(tmp_path).layers
    assert [layer.has_experts for layer in layers] == [False, True, False, False, False, True]
    (tmp_path / "config.json").write_text(json.dumps(MIXTURES["DeepSeek-V3"]))
    layers = read_model_shape(tmp_path).layers
    assert [layer.has_experts for layer in layers] == [False] * 3 + [True] * 58


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_compute_in_the_type_that_the_engine_and_explain_take_from_the_family(
    tmp_path, name
):
    from rlsys.config import PolicyConfig
    from rlsys.engines.megatron.build import _expert_options

    (tmp_path / "config.json").write_text(json.dumps(MIXTURES[name]))
    shape = read_model_shape(tmp_path)
    in_fp32 = shape.model_type.startswith(("deepseek", "glm"))
    assert shape.family.router_dtype == ("fp32" if in_fp32 else None)
    options = _expert_options(shape, PolicyConfig())
    assert options["moe_router_dtype"] == shape.family.router_dtype
    options = _expert_options(shape, PolicyConfig(moe_router_dtype="fp64"))
    assert options["moe_router_dtype"] == "fp64"
