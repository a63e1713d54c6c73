"""An order-sensitive 64-bit checksum in plain torch ops, the same number on CPU and GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from rlsys.weight_sync.plan import Bucket
from rlsys.weight_sync.transport import WeightSyncError

# Words summed at once: the int64 temporaries of a chunk (2 MiB each) stay in a CPU's cache, and a
# GPU is still busy with each.
CHUNK_WORDS = 1 << 18
# Odd constants of splitmix64 (Steele, Lea, Flood 2014) and FNV-1a, as signed 64-bit numbers.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = 0xBF58476D1CE4E5B9 - (1 << 64)
PRIME = 0x100000001B3


def checksum(data: torch.Tensor) -> int:
    """Checksum of `data` [nbytes] uint8 as an unsigned 64-bit number.

    With the bytes read as 32-bit words x_i (signed, zeros after the last byte), it is
    sum_i w_i x_i modulo 2**64 within a chunk, with w_i odd and pseudo-random, and a polynomial in
    the chunks. A change of one word always changes it, since w_i is odd; words that moved or any
    other damage go unseen with a chance of about 2**-32 or less. It is not cryptographic.
    """
    assert data.dtype == torch.uint8, data.dtype
    assert data.dim() == 1, data.shape
    total = torch.full((), data.numel(), dtype=torch.int64, device=data.device)
    for chunk in torch.split(_words(data), CHUNK_WORDS):
        weights = _weights(data.device)[: chunk.numel()]
        total = total * PRIME + (chunk.to(torch.int64).mul_(weights)).sum()
    return int(total.item()) % (1 << 64)


def compare_checksums(
    buckets: Sequence[Bucket], sent: Sequence[int], received: Sequence[int], *, receiver: str
) -> None:
    """Raises WeightSyncError naming the first bucket that did not arrive as it was sent."""
    for bucket, ours, theirs in zip(buckets, sent, received, strict=True):
        if ours != theirs:
            names = ", ".join(meta.name for meta in bucket.tensors)
            raise WeightSyncError(
                f"{receiver} received other bytes than the policy sent: checksum {theirs:016x} "
                f"instead of {ours:016x} in bucket {bucket.index} of {len(buckets)}, which holds "
                f"{names}"
            )


def _words(data: torch.Tensor) -> torch.Tensor:
    """`data` as int32, copied only if it ends or starts in the middle of a word."""
    tail = -data.numel() % 4
    if tail:
        data = torch.cat([data, data.new_zeros(tail)])
    elif data.storage_offset() % 4 or not data.is_contiguous():
        data = data.clone(memory_format=torch.contiguous_format)
    return data.view(torch.int32)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> torch.Tensor:
    """[CHUNK_WORDS] odd int64 multipliers, splitmix64's mixing of the position."""
    position = torch.arange(1, CHUNK_WORDS + 1, dtype=torch.int64)
    mixed = position * GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * MIX
    return (mixed | 1).to(device)
