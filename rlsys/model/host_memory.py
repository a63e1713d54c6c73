"""What of a colocated policy waits in host memory, and in which pieces that is pinned."""

from __future__ import annotations

from collections.abc import Iterator

SLAB_BYTES = 2**29
"""Largest piece that is pinned at once. CUDA's host allocator rounds each up to a power of two."""
LARGE_WEIGHTS = 0.1
"""Share of a GPU from which weights leave it, if colocated.offload_weights is auto."""


def slab_sizes(num_bytes: int) -> Iterator[int]:
    """Sizes of the pieces that hold `num_bytes`: whole slabs, and a power of two for the rest."""
    while num_bytes > 0:
        size = min(SLAB_BYTES, 1 << (num_bytes - 1).bit_length())
        yield size
        num_bytes -= size
