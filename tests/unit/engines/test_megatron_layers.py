"""Layers of the CPU, and of pipeline stages, beside what they are taken for."""

import math

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from transformers.masking_utils import sliding_window_causal_mask_function

from rlsys.config.pipeline_layout import parse_layout
from rlsys.engines.megatron import layers
from rlsys.engines.megatron.layers import PackedAttention


def attention(window, *, layer_number=1):
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        window_size=window and (window - 1, 0),
        window_attn_skip_freq=window and [1, 0],
    )
    return PackedAttention(config, layer_number)


def expected(query, key, value, window):
    """Softmax over the tokens that transformers' mask shows; a key head serves two of queries."""
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    at = torch.arange(query.shape[2])
    mask = sliding_window_causal_mask_function(window)(0, 0, at[:, None], at)
    scores = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[3])).masked_fill(
        ~mask, -torch.inf
    )
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("window", [1, 2, 5, 8, 36, 37, 38, 100])
def test_a_query_sees_as_many_tokens_as_in_transformers(window, monkeypatch):
    monkeypatch.setattr(layers, "QUERY_BLOCK", 8)  # so that 37 tokens are several blocks
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 37, 8) for heads in (4, 2, 2))
    attended = attention(window)._padded(query, key, value)
    torch.testing.assert_close(attended, expected(query, key, value, window))


def test_layers_without_a_window_see_everything():
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 37, 8) for heads in (4, 2, 2))
    for without in (attention(5, layer_number=2), attention(None)):
        attended = without._padded(query, key, value)
        torch.testing.assert_close(attended, expected(query, key, value, 37))


@pytest.mark.parametrize(
    "text",
    [
        "EtL",
        "Et*3|t*1L",
        "Ettt|(tt|)*29,L",
        "E|t*4|t*4|L",
        "E(t|)*3tL",
        "Et|t|t|tL",
        "E,t*12,|,t*10,L",
        "E||tL",
    ],
)
def test_the_notation_of_pipeline_stages_is_megatron_cores(text):
    names = {"E": "embedding", "t": "decoder", "L": "loss"}
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    mine = [[names[letter] for letter in stage] for stage in parse_layout(text)]
    assert mine == [[layer.name for layer in stage] for stage in theirs]
