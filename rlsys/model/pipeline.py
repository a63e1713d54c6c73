"""The pipeline rank that needs the most memory: parameters, and activations in flight."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlsys.config import PolicyConfig
from rlsys.config.pipeline_layout import rank_layers
from rlsys.model.shape import ModelShape


def rank_params(
    shape: ModelShape, ranks: Sequence[Sequence[int]], *, tp: int, ep: int
) -> tuple[int, int]:
    """Parameters without experts and of experts on the pipeline rank with the most.

    The last rank has an output head of its own, even if the head is tied to the embedding.

    Args:
        ranks: the layers of each pipeline rank, from `rank_layers`.
    """
    sizes = []
    for rank, layers in enumerate(ranks):
        dense, experts = shape.layer_params([shape.layers[layer] for layer in layers])
        ends = shape.embedding_params if rank == 0 else 0
        if rank == len(ranks) - 1 and not (shape.tied and rank == 0):
            ends += shape.head_params
        sizes.append(((dense + ends) // tp, experts // ep))
    return max(sizes, key=sum)


def busiest_rank(policy: PolicyConfig, shape: ModelShape) -> tuple[int, float]:
    """(layers, micro-batches in flight) of the pipeline rank that keeps most activations.

    Before its first backward pass rank r runs the micro-batches of all ranks behind it. With V
    chunks a rank it runs 2 (PP - r - 1) + (V - 1) PP + 1 of them through one chunk each
    (arXiv:2104.04473, section 2.2).
    """
    pp, chunks = policy.pipeline_parallel_size, policy.virtual_pipeline_size
    kept = []
    for rank, layers in enumerate(rank_layers(policy, shape.num_layers)):
        in_flight = float(pp - rank)
        if chunks > 1:
            in_flight = (2 * (pp - rank - 1) + (chunks - 1) * pp + 1) / chunks
        kept.append((len(layers), in_flight))
    return max(kept, key=math.prod)
