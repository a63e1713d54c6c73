"""What vLLM is given of a rotary embedding: the factors that transformers computes."""

import json
import math

import pytest
from transformers import LlamaConfig, Ministral3Config, Olmo3Config, Phi3Config

from rlsys.engines.vllm.rope import rope_overrides
from rlsys.engines.vllm.serving import EngineOptions, serve_command, serving_arguments

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def overrides(rope, config_class=LlamaConfig, **values):
    config = config_class(max_position_embeddings=256, rope_parameters=dict(rope), **values)
    return rope_overrides(config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2},
    ],
)
def test_most_models_need_no_other_words(rope):
    assert overrides(rope) == {}


def test_a_whole_number_is_not_taken_for_a_list_of_factors():
    rope = overrides({"rope_type": "linear", "rope_theta": 1e4, "factor": 4})["rope_parameters"]
    assert type(rope["factor"]) is float
    assert rope["factor"] == 4


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.3}, 1.3),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
    ],
)
def test_each_version_of_vllm_reads_the_factor_of_transformers(more, factor):
    rope = overrides(YARN | more | {"beta_fast": None})["rope_parameters"]
    assert rope["attention_factor"] == pytest.approx(factor)  # 0.32
    assert rope["attn_factor"] * (0.1 * math.log(4) + 1) == pytest.approx(factor)  # 0.26
    assert "beta_fast" not in rope


def test_layers_of_another_type_keep_theirs():
    types = ["sliding_attention", "full_attention"]
    sliding = {"rope_type": "default", "rope_theta": 5e5}
    config = Olmo3Config(
        num_hidden_layers=2,
        max_position_embeddings=256,
        layer_types=types,
        rope_parameters={"sliding_attention": dict(sliding), "full_attention": dict(YARN)},
    )
    rope = rope_overrides(config)["rope_parameters"]
    assert rope["sliding_attention"] == sliding
    assert rope["full_attention"]["attn_factor"] == pytest.approx(1.0)


def test_longrope_has_one_factor_for_short_and_long_rows():
    config = Phi3Config(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "attention_factor": 1.2,
        },
    )
    rope = rope_overrides(config)["rope_parameters"]
    assert (rope["short_mscale"], rope["long_mscale"]) == (1.2, 1.2)


def test_the_scaling_of_queries_by_position_is_named_as_vllm_reads_it():
    found = overrides(YARN | {"llama_4_scaling_beta": 0.1}, Ministral3Config)
    assert found["llama_4_scaling"] == {"beta": 0.1, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
def test_chat_and_server_get_the_same_factors(tmp_path, rope):
    LlamaConfig(max_position_embeddings=256, rope_parameters=rope).save_pretrained(tmp_path)
    options = EngineOptions("cpu")
    arguments = serving_arguments(tmp_path, options)
    command = serve_command(tmp_path, options, names=["m"], host="127.0.0.1", port=1)
    assert ("hf_overrides" in arguments) is ("--hf-overrides" in command) is (rope is not None)
    if rope is not None:
        said = json.loads(command[command.index("--hf-overrides") + 1])
        assert said == arguments["hf_overrides"]
        assert said["rope_parameters"]["attn_factor"] == pytest.approx(1.0)
