"""Rotary embeddings of latent attention: vLLM is given those of transformers."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlsys.engines.vllm import rope

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


def config_of(**parameters):
    return DeepseekV3Config(max_position_embeddings=512, rope_parameters=parameters)


@pytest.fixture(params=[True, False], ids=["CPU", "GPU"])
def on_cpu(request, monkeypatch):
    monkeypatch.setattr(type(rope.current_platform), "is_cpu", lambda _: request.param)
    return request.param


def test_plain_frequencies_are_said_as_yarn_on_cpu(on_cpu):
    config = config_of(rope_type="default", rope_theta=5e4)
    overrides = rope.rope_overrides(config)
    if not on_cpu:
        assert overrides == {}
        return
    plain = 1 / 5e4 ** (torch.arange(0, 64, 2) / 64)
    config.rope_parameters = overrides["rope_parameters"]
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    torch.testing.assert_close(frequencies, plain)
    assert factor == 1.0


def test_yarn_of_latent_attention_stays_as_it_is(on_cpu):
    assert rope.rope_overrides(config_of(**YARN, mscale=1.0, mscale_all_dim=1.0)) == {}
