"""Mixtures of experts in plain transformers that replay a routing, and what they add to a loss."""

from __future__ import annotations

from types import MethodType

import torch

NUM_EXPERTS, TOP_K = 8, 2
"""Of the tiny models."""


def random_routing(lengths, *, num_layers=2, seed=0):
    """Choices for all tokens of each row but its last, most of them not the model's own."""
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.rand(length - 1, num_layers, NUM_EXPERTS, generator=rng)
        .topk(TOP_K)
        .indices.byte()
        .numpy()
        for length in lengths.tolist()
    ]


def replay(model, batch):
    """Send the tokens of the padded batch to the experts of `batch.routed_experts`.

    Where it has none, and everywhere if it is None, routers choose. Returns one list for each
    layer, to which every forward pass appends what the router did: logits and choices, both
    [N * S, ...].
    """
    records = []
    for layer, block in enumerate(model.model.layers):
        experts_NSK = torch.zeros(*batch.input_ids.shape, TOP_K, dtype=torch.int64)
        routed_NS = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, experts in enumerate(batch.routed_experts or []):
            experts_NSK[row, : len(experts)] = torch.tensor(experts[:, layer]).long()
            routed_NS[row, : len(experts)] = True
        records.append([])
        gate = block.mlp.gate
        gate.forward = MethodType(
            _forward(experts_NSK.flatten(0, 1), routed_NS.flatten(), records[-1]), gate
        )
    return records


def _forward(experts_TK, routed_T, record):
    def forward(gate, hidden):
        logits = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        probs = logits.softmax(-1)
        chosen = torch.where(routed_T[:, None], experts_TK, probs.topk(TOP_K).indices)
        weights = probs.gather(1, chosen)
        if gate.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        record.append((logits, chosen))
        return logits, weights, chosen

    return forward
