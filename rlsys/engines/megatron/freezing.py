"""A model of which only some parameters are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlsys.engines.megatron.weights import MegatronWeights
from rlsys.model.families.base import EMBEDDING, HF_EMBEDDING, OUTPUT


def freeze(weights: MegatronWeights, frozen: frozenset[str]) -> None:
    """Freeze parameters, by Hugging Face's names of all tensors that each consists of."""
    for row in weights.table:
        parameter = weights.own_parameter(row)
        if parameter is not None and row.hf_names[0] in frozen:
            parameter.requires_grad_(False)
    if weights.tied and HF_EMBEDDING in frozen:
        for parameter in weights.parameters_named(EMBEDDING, OUTPUT):
            parameter.requires_grad_(False)
    if len(set(_trained_by_layer(weights, frozen).values())) > 1:
        # Layers with an optimizer state of their own share no tensor of a checkpoint.
        weights.sharding["non_homogeneous_layers"] = True


def _trained_by_layer(
    weights: MegatronWeights, frozen: frozenset[str]
) -> dict[str, frozenset[str]]:
    """For each layer of the whole model, by its number: its trained tensors."""
    trained: dict[str, frozenset[str]] = {}
    for row in weights.table:
        _, is_in_layer, name = row.hf_names[0].partition(".layers.")
        layer, _, tensor = name.partition(".")
        if is_in_layer:
            own = frozenset() if row.hf_names[0] in frozen else frozenset([tensor])
            trained[layer] = trained.get(layer, frozenset()) | own
    return trained


def lead_gradients_to(chunks: Sequence[torch.nn.Module]) -> None:
    """Let gradients flow to trained layers behind frozen ones.

    megatron-core computes a layer again only if its input has a gradient, and the first pipeline
    stage takes the gradient of its output even if it trains nothing.
    """

    def with_gradient(module: torch.nn.Module, inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()
        return hidden

    for chunk in chunks:
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(with_gradient)
