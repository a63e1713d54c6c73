"""Layers whose weights vLLM quantises while it loads them in the model's type.

A weight sync sends the policy's weights as they are. vLLM's loader collects the parts of a layer,
quantises them as at the start of the engine, and copies the result to where the layer's kernels
read it. So scales always belong to the weights that came last.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

_IN_FULL = "bias"
"""What vLLM (0.32) does not note of a layer, because it loads it as it is."""


def made_by_quantising(model: torch.nn.Module) -> Iterator[str]:
    """Names of the parameters that vLLM added to layers, such as scales; no policy sends them."""
    for prefix, layer in model.named_modules():
        if getattr(getattr(layer, "quant_method", None), "uses_meta_device", False):
            before, _ = get_layerwise_info(layer).restore_metadata
            for name in layer._parameters:
                if name not in before and name != _IN_FULL:
                    yield f"{prefix}.{name}"
