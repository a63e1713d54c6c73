"""Which tensors travel in which bucket: computed from the metadata, so that both sides agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Each tensor starts at a multiple of this many bytes, so that it can be viewed as its own type
# and copied with wide loads whatever type precedes it.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Hugging Face name, type and shape of one exported tensor."""

    name: str
    dtype: str
    """Torch's name: "float32", "bfloat16" or "float16"."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A box of an exported tensor, or the whole tensor; it travels as a tensor of its own."""

    tensor: TensorMeta
    """The whole tensor."""
    starts: tuple[int, ...]
    """Start of the box on each axis."""
    shape: tuple[int, ...]
    """Size of the box on each axis."""

    @classmethod
    def whole(cls, meta: TensorMeta) -> TensorSlice:
        """The slice that is all of a tensor."""
        return cls(meta, (0,) * len(meta.shape), meta.shape)

    @property
    def is_whole(self) -> bool:
        """Whether the slice is all of its tensor."""
        return self.shape == self.tensor.shape

    @property
    def meta(self) -> TensorMeta:
        """The slice as a tensor of its own; a part is named `name[2:4, 0:8]`."""
        if self.is_whole:
            return self.tensor
        ranges = (f"{start}:{start + n}" for start, n in zip(self.starts, self.shape, strict=True))
        return TensorMeta(f"{self.tensor.name}[{', '.join(ranges)}]", self.tensor.dtype, self.shape)

    def intersection(self, other: TensorSlice) -> TensorSlice | None:
        """The common part of two slices of a tensor; None if they do not overlap."""
        assert self.tensor == other.tensor, (self, other)
        starts, shape = [], []
        for a, size_a, b, size_b in zip(
            self.starts, self.shape, other.starts, other.shape, strict=True
        ):
            start, stop = max(a, b), min(a + size_a, b + size_b)
            if start >= stop:
                return None
            starts.append(start)
            shape.append(stop - start)
        return TensorSlice(self.tensor, tuple(starts), tuple(shape))

    def within(self, tensor: torch.Tensor, outer: TensorSlice) -> torch.Tensor:
        """This slice as a view of `tensor`, which holds the slice `outer`."""
        for axis, (start, size) in enumerate(zip(self.starts, self.shape, strict=True)):
            tensor = tensor.narrow(axis, start - outer.starts[axis], size)
        return tensor


def shard_bounds(length: int, index: int, num_shards: int) -> tuple[int, int]:
    """(start, stop) of slice `index` of `num_shards` along an axis of `length`.

    All slices have the same length, except the last ones if `num_shards` does not divide `length`,
    as with a vocabulary.
    """
    size = -(-length // num_shards)
    return min(index * size, length), min((index + 1) * size, length)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive tensors that travel in one broadcast."""

    index: int
    tensors: tuple[TensorMeta, ...]
    offsets: tuple[int, ...]
    """Where each tensor starts, in bytes."""
    nbytes: int
    """A multiple of ALIGNMENT."""

    def views(self, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs that share the memory of `buffer` [nbytes] uint8."""
        return [
            (meta.name, _typed_view(buffer, meta, offset))
            for meta, offset in zip(self.tensors, self.offsets, strict=True)
        ]

    def __str__(self) -> str:
        first, last = self.tensors[0].name, self.tensors[-1].name
        if len(self.tensors) == 1:
            return f"bucket {self.index} ({first})"
        return f"bucket {self.index} ({len(self.tensors)} tensors, {first} to {last})"


def plan_buckets(metadata: Sequence[TensorMeta], bucket_bytes: int) -> list[Bucket]:
    """Cut `metadata` into buckets of at most `bucket_bytes`, in order.

    A larger tensor gets a bucket of its own.

    Raises:
        ValueError: no tensors, two with one name, or a type that is not in DTYPES.
    """
    _check(metadata)
    contents: list[list[TensorMeta]] = [[]]
    used = 0
    for meta in metadata:
        if contents[-1] and used + _aligned_size(meta) > bucket_bytes:
            contents.append([])
            used = 0
        contents[-1].append(meta)
        used += _aligned_size(meta)
    return [_bucket(index, tensors) for index, tensors in enumerate(contents)]


def _bucket(index: int, tensors: Sequence[TensorMeta]) -> Bucket:
    *offsets, nbytes = accumulate(map(_aligned_size, tensors), initial=0)
    return Bucket(index, tuple(tensors), tuple(offsets), nbytes)


def _aligned_size(meta: TensorMeta) -> int:
    return -(-meta.nbytes // ALIGNMENT) * ALIGNMENT


def _check(metadata: Sequence[TensorMeta]) -> None:
    if not metadata:
        raise ValueError("weight sync got no tensors to send")
    seen: set[str] = set()
    for meta in metadata:
        if meta.name in seen:
            raise ValueError(f"weight sync got tensor {meta.name!r} twice")
        if meta.dtype not in DTYPES:
            raise ValueError(
                f"tensor {meta.name!r} has type {meta.dtype!r}; weight sync knows "
                f"{', '.join(DTYPES)}"
            )
        seen.add(meta.name)


def _typed_view(buffer: torch.Tensor, meta: TensorMeta, offset: int) -> torch.Tensor:
    flat = buffer[offset : offset + meta.nbytes].view(DTYPES[meta.dtype])
    return flat.view(meta.shape)
