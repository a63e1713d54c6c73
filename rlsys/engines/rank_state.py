"""The state of one rank of a model as bytes, for another process to keep."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor in the memory that a state holds."""

    storage: int
    """Index of the storage that it views."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Numbers of `dtype` before its first one."""
    on_host: bool

    def view(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor, in the memory of a storage."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        return tensor.set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of an optimizer's state: one part, or those that make up one in FP8."""

    parts: tuple[TensorPlace, ...]


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What one optimizer of a rank has beside the parameters that it updates."""

    groups: list[dict[str, Any]]
    """The settings of each group of parameters, such as its number of steps."""
    values: list[dict[str, Any]]
    """For each parameter, in order: each part of its state, a StoredTensor or a number."""


@dataclass(frozen=True, slots=True)
class RankState:
    """What a rank needs to go on from, beside the files of its model.

    It fits a rank at the same place of the same layout only, and gives it the same bits.
    """

    version: int
    """Of the weights: completed updates."""
    memory: list[np.ndarray]
    """The bytes of each storage, [nbytes] uint8. They may be those of the rank itself: until they
    have been copied, nothing may change them."""
    checksums: list[int]
    """CRC-32 of each."""
    optimizers: list[OptimizerState]
    num_scheduler_steps: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all storages."""
        return sum(array.nbytes for array in self.memory)

    def check(self) -> None:
        """Compare the bytes with their checksums.

        Raises:
            ValueError: they are not those that were taken.
        """
        for number, (array, expected) in enumerate(zip(self.memory, self.checksums, strict=True)):
            if zlib.crc32(array.data) != expected:
                raise ValueError(
                    f"the snapshot of version {self.version} is damaged: part {number} of "
                    f"{len(self.memory)}, {array.nbytes} bytes, has another checksum"
                )


def checksums_of(memory: Sequence[np.ndarray]) -> list[int]:
    """See RankState.checksums."""
    return [zlib.crc32(array.data) for array in memory]
