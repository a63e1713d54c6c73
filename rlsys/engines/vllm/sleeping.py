"""What a worker of a sleeping engine keeps of the memory that vLLM gives back.

A sleeping vLLM (0.26 to 0.32) gives back all GPU memory that it took while it loaded the model and
made the KV cache. Addresses stay, content goes. At level 2 it keeps the model's buffers only. But
small tensors of many kinds share that memory: tables and scratch of attention backends, tensors
that modules hold as plain attributes, slots of adapters, a draft model. A weight sync brings none
of them, and a kernel that reads what the memory held by chance gives wrong tokens, not an error.

So before an engine sleeps, a worker copies all of this memory to the host, except the large weights
of the model, which the next weight sync brings, and the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from vllm.platforms import current_platform

Tag = Literal["weights", "kv_cache"]
"""vLLM's names of the two kinds of memory, which wake up one after the other."""
TAGS: tuple[Tag, ...] = ("weights", "kv_cache")
MEMORY_OF: dict[Tag, str] = {"weights": "weights", "kv_cache": "KV cache"}
"""What errors call that memory."""
LARGE_WEIGHT_BYTES = 2**18
"""Weights of fewer bytes are kept too: it costs little, and scales that no sync brings stay."""
SMALL_ALLOCATION_BYTES = 20 * 2**20
"""The most that torch takes for tensors that share memory; a layer's KV cache takes more."""


class Region(NamedTuple):
    """Consecutive bytes of a GPU's memory."""

    start: int
    end: int


class KeptMemory:
    """Copies in host memory of what a sleeping worker must not forget.

    Args:
        weights: the weights of the worker's model that the next weight sync brings; None if vLLM
            itself keeps all of them (level 1).
    """

    def __init__(self, weights: Iterable[torch.Tensor] | None):
        self._copies: dict[Tag, list[tuple[int, torch.Tensor]]] = {}
        allocated = _allocated_regions()
        kept: dict[Tag, list[Region]] = {
            "kv_cache": [
                region
                for region in allocated.get("kv_cache", [])
                if region.end - region.start <= SMALL_ALLOCATION_BYTES
            ]
        }
        if weights is not None:
            kept["weights"] = without(allocated.get("weights", []), map(_region, weights))
        for tag, regions in kept.items():
            self._copies[tag] = [(region.start, _copy_to_host(region)) for region in regions]

    def restore(self, tag: Tag) -> None:
        """Put back what was in the memory of that kind, which has to be awake."""
        for start, copy in self._copies.pop(tag, []):
            _copy_bytes(start, copy.data_ptr(), copy.numel())


def without(
    regions: Sequence[Region], weights: Iterable[Region], *, large: int = LARGE_WEIGHT_BYTES
) -> list[Region]:
    """The parts of `regions` that are not in weights of at least `large` bytes."""
    forgotten = sorted(region for region in weights if region.end - region.start >= large)
    kept = []
    for start, end in sorted(regions):
        for gone in forgotten:
            if gone.end <= start or gone.start >= end:
                continue
            if gone.start > start:
                kept.append(Region(start, gone.start))
            start = gone.end
        if start < end:
            kept.append(Region(start, end))
    return kept


def _region(tensor: torch.Tensor) -> Region:
    """The memory of a dense tensor."""
    start = tensor.data_ptr()
    return Region(start, start + tensor.numel() * tensor.element_size())


def _allocated_regions() -> Mapping[str, Sequence[Region]]:
    """The memory that vLLM gives back, by its tag; nothing on CPU, where it keeps all."""
    if not current_platform.is_cuda_alike():
        return {}
    from vllm.device_allocator.cumem import CuMemAllocator

    torch.cuda.synchronize()
    regions: dict[str, list[Region]] = {}
    for start, data in CuMemAllocator.get_instance().pointer_to_data.items():
        regions.setdefault(data.tag, []).append(Region(start, start + data.handle[1]))
    return regions


def _copy_to_host(region: Region) -> torch.Tensor:
    # torch keeps pinned memory for the next time.
    copy = torch.empty(region.end - region.start, dtype=torch.uint8, pin_memory=True)
    _copy_bytes(copy.data_ptr(), region.start, copy.numel())
    return copy


def _copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copy between addresses of host and GPU; returns when it is done."""
    from vllm.device_allocator.cumem import libcudart

    libcudart.cudaMemcpy(target, source, nbytes)
