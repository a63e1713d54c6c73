"""An order-sensitive 64-bit checksum in plain torch ops, equal on CPU and GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rlsys.weight_sync.plan import Bucket
from rlsys.weight_sync.transport import WeightSyncError

# Words of a chunk: its int64 temporaries (2 MiB each) fit in the cache of a CPU.
CHUNK_WORDS = 1 << 18
# Odd constants of splitmix64 (Steele, Lea, Flood 2014) and FNV-1a, as signed 64-bit numbers.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = 0xBF58476D1CE4E5B9 - (1 << 64)
PRIME = 0x100000001B3


def checksum(data: Tensor) -> Tensor:
    """Checksum of `data` [nbytes] uint8: a 0-dim int64 on its device, see `as_numbers`.

    The bytes are read as 32-bit words x_i (signed, padded with zeros). The checksum of a chunk is
    sum_i w_i x_i modulo 2**64 with odd pseudo-random w_i; a polynomial combines the chunks. A
    change of one word always changes the checksum, since w_i is odd. Moved words or any other
    damage stay unseen with a chance of about 2**-32 or less. It is not cryptographic.
    """
    assert data.dtype == torch.uint8, data.dtype
    assert data.dim() == 1, data.shape
    words = _words(data)
    num_whole = words.numel() // CHUNK_WORDS
    whole, rest = words.split([num_whole * CHUNK_WORDS, words.numel() - num_whole * CHUNK_WORDS])
    weights = _weights(data.device)
    terms = [torch.full((1,), data.numel(), dtype=torch.int64, device=data.device)]
    if num_whole:
        terms.append(_sums_of_chunks(whole.view(num_whole, CHUNK_WORDS), weights))
    if rest.numel():
        terms.append(_weighted_sum(rest, weights[: rest.numel()])[None])
    polynomial = torch.cat(terms)
    return (polynomial * _powers(data.device, len(polynomial))).sum()


def as_numbers(checksums: Sequence[Tensor]) -> list[int]:
    """Checksums as unsigned 64-bit numbers, fetched from their device in one copy."""
    if not checksums:
        return []
    return [number % (1 << 64) for number in torch.stack(list(checksums)).tolist()]


def compare_checksums(
    buckets: Sequence[Bucket], sent: Sequence[int], received: Sequence[int], *, receiver: str
) -> None:
    """Raise a WeightSyncError that names the first damaged bucket, if there is one."""
    for bucket, ours, theirs in zip(buckets, sent, received, strict=True):
        if ours != theirs:
            names = ", ".join(meta.name for meta in bucket.tensors)
            raise WeightSyncError(
                f"{receiver} received other bytes than the policy sent: checksum {theirs:016x} "
                f"instead of {ours:016x} in bucket {bucket.index} of {len(buckets)}, which holds "
                f"{names}"
            )


def _words(data: Tensor) -> Tensor:
    """`data` as int32; it is copied only if it starts or ends in the middle of a word."""
    tail = -data.numel() % 4
    if tail:
        data = torch.cat([data, data.new_zeros(tail)])
    elif data.storage_offset() % 4 or not data.is_contiguous():
        data = data.clone(memory_format=torch.contiguous_format)
    return data.view(torch.int32)


def _weighted_sum(words: Tensor, weights: Tensor) -> Tensor:
    return (words.to(torch.int64) * weights).sum(dim=-1)


_fused_weighted_sum = functools.cache(functools.partial(torch.compile, _weighted_sum, dynamic=True))


def _sums_of_chunks(chunks: Tensor, weights: Tensor) -> Tensor:
    """[chunks, words] int32 -> [chunks] int64."""
    if chunks.device.type == "cpu":
        return torch.stack([_weighted_sum(chunk, weights) for chunk in chunks])
    # One kernel reads each word once; single ops would move five times as many bytes.
    return _fused_weighted_sum()(chunks, weights)


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """[CHUNK_WORDS] odd int64 weights: the position, mixed as in splitmix64."""
    position = torch.arange(1, CHUNK_WORDS + 1, dtype=torch.int64)
    mixed = position * GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * MIX
    return (mixed | 1).to(device)


@functools.lru_cache(maxsize=64)
def _powers(device: torch.device, num_powers: int) -> Tensor:
    """[num_powers] int64, PRIME ** (num_powers - 1) ... PRIME ** 0 modulo 2**64."""
    powers = [pow(PRIME, exponent, 1 << 64) for exponent in range(num_powers)]
    signed = [power - (1 << 64) if power >= 1 << 63 else power for power in powers]
    return torch.tensor(signed[::-1], dtype=torch.int64).to(device)
