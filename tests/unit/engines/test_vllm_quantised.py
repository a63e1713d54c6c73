"""Which parameters of a quantising engine no weight sync has to bring."""

from types import SimpleNamespace

import torch
from torch import nn
from vllm.model_executor.model_loader.reload.layerwise import (
    get_layerwise_info,
    record_metadata_for_reloading,
)

from rlsys.engines.vllm.quantised import made_by_quantising


def layer(*, quantises):
    made = nn.Linear(4, 4)
    made.quant_method = SimpleNamespace(uses_meta_device=quantises)
    return made


def test_scales_of_quantised_layers_come_from_no_policy():
    model = nn.ModuleDict({"qkv": layer(quantises=True), "head": layer(quantises=False)})
    model["norm"] = nn.LayerNorm(4)
    record_metadata_for_reloading(model)
    assert "weight" in get_layerwise_info(model["qkv"]).restore_metadata[0]
    assert list(made_by_quantising(model)) == []
    for name in ("qkv", "head"):
        model[name].register_parameter("weight_scale", nn.Parameter(torch.ones(1)))
    assert list(made_by_quantising(model)) == ["qkv.weight_scale"]
