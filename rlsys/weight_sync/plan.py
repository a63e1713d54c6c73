"""Which tensors travel in which bucket: made from the metadata alone, so both sides agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Each tensor starts at a multiple of this many bytes, so that it can be viewed as its own type
# and copied with wide loads whatever type precedes it.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Name, type and shape of one exported tensor, in the names of the Hugging Face model."""

    name: str
    dtype: str
    """As torch spells it: "float32", "bfloat16" or "float16"."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A box of an exported tensor, or all of it, which travels as a tensor of its own."""

    of: TensorMeta
    """The whole tensor."""
    starts: tuple[int, ...]
    """Where the box begins, on each axis."""
    shape: tuple[int, ...]
    """Its size on each axis."""

    @classmethod
    def whole(cls, meta: TensorMeta) -> TensorSlice:
        """All of a tensor."""
        return cls(meta, (0,) * len(meta.shape), meta.shape)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.shape == self.of.shape

    @property
    def meta(self) -> TensorMeta:
        """Of the slice by itself; the name of a part says which: `name[2:4, 0:8]`."""
        if self.is_whole:
            return self.of
        ranges = (f"{start}:{start + n}" for start, n in zip(self.starts, self.shape, strict=True))
        return TensorMeta(f"{self.of.name}[{', '.join(ranges)}]", self.of.dtype, self.shape)

    def intersection(self, other: TensorSlice) -> TensorSlice | None:
        """What two slices of a tensor have in common, if anything."""
        assert self.of == other.of, (self, other)
        starts, shape = [], []
        for a, size_a, b, size_b in zip(
            self.starts, self.shape, other.starts, other.shape, strict=True
        ):
            start, stop = max(a, b), min(a + size_a, b + size_b)
            if start >= stop:
                return None
            starts.append(start)
            shape.append(stop - start)
        return TensorSlice(self.of, tuple(starts), tuple(shape))

    def within(self, tensor: torch.Tensor, outer: TensorSlice) -> torch.Tensor:
        """This slice as a view of `tensor`, which is the slice `outer`."""
        for axis, (start, size) in enumerate(zip(self.starts, self.shape, strict=True)):
            tensor = tensor.narrow(axis, start - outer.starts[axis], size)
        return tensor


def shard_bounds(length: int, index: int, number: int) -> tuple[int, int]:
    """(start, stop) of slice `index` of `number` along an axis of `length`.

    All slices are as long as the first, but for the last ones where `number` does not divide
    `length`: those of a vocabulary.
    """
    size = -(-length // number)
    return min(index * size, length), min((index + 1) * size, length)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive tensors that are sent at once."""

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

    A tensor larger than that gets a bucket of its own.

    Raises:
        ValueError: no tensors, a name twice, or a type that weight sync does not know.
    """
    _check(metadata)
    buckets: list[Bucket] = []
    tensors: list[TensorMeta] = []
    offsets: list[int] = []
    used = 0
    for meta in metadata:
        size = -(-meta.nbytes // ALIGNMENT) * ALIGNMENT
        if tensors and used + size > bucket_bytes:
            buckets.append(Bucket(len(buckets), tuple(tensors), tuple(offsets), used))
            tensors, offsets, used = [], [], 0
        tensors.append(meta)
        offsets.append(used)
        used += size
    buckets.append(Bucket(len(buckets), tuple(tensors), tuple(offsets), used))
    return buckets


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
