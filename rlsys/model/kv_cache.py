"""What a rollout engine's KV cache holds of a sequence, by kind of layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rlsys.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class KVLayers:
    """Layers whose part of the KV cache is alike."""

    layers: int
    """Their number, in which vLLM fills them up to groups of equal size."""
    tokens: int
    """Most tokens that each of them keeps of a sequence."""
    has_window: bool
    is_linear: bool = False
    """Whether each keeps a state of constant size, which takes one block."""

    def blocks(self, tokens: int, block_tokens: int) -> int:
        """Blocks of one layer each that hold `tokens`; a window may begin within a block."""
        if self.is_linear:
            return self.layers
        return self.layers * (-(-tokens // block_tokens) + self.has_window)


def kv_layers(shape: ModelShape, *, row: int, prompt: int) -> list[KVLayers]:
    """The kinds of layers: without windows, with each window, and linear ones.

    vLLM frees what has left a window, but not while a prompt is read, and gives each block to a
    group of layers of one kind. Groups have the size of the smallest kind, or of the largest where
    that wastes little (0.32; versions before it differ by a few layers).

    Args:
        row: tokens of the longest sequence.
        prompt: tokens of the longest prompt.
    """
    counts = Counter((layer.window, layer.is_linear) for layer in shape.layers)
    small, large = min(counts.values()), max(counts.values())
    group = large if large < 1.5 * small else small
    return [
        KVLayers(
            -(-count // group) * group,
            row if window is None else min(row, max(window, prompt)),
            window is not None,
            is_linear,
        )
        for (window, is_linear), count in counts.items()
    ]


def cache_blocks(kinds: list[KVLayers], *, row: int, sequences: int, block_tokens: int) -> int:
    """Blocks of one layer each: for `sequences`, and for what vLLM asks for at its start."""
    # That is one sequence, of which windows may see all tokens at once.
    one = sum(kind.blocks(row, block_tokens) for kind in kinds)
    each = sum(kind.blocks(kind.tokens, block_tokens) for kind in kinds)
    own = min(kind.layers for kind in kinds)  # vLLM keeps a block for itself
    return max(one, sequences * each) + own
