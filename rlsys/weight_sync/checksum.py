"""An order-sensitive 64-bit checksum in plain torch ops, equal on CPU and GPU.

The pass that computes it can also look for NaNs and infinities: `FiniteChecksums`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rlsys.weight_sync.plan import DTYPES, Bucket
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
    return _checksum(data, None)[0]


def _checksum(data: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """The checksum; with the `dtype` of the data also a bool for each chunk that is not finite."""
    assert data.dtype == torch.uint8, data.dtype
    assert data.dim() == 1, data.shape
    words = _words(data)
    num_whole = words.numel() // CHUNK_WORDS
    whole, rest = words.split([num_whole * CHUNK_WORDS, words.numel() - num_whole * CHUNK_WORDS])
    weights = _weights(data.device)
    terms = [torch.full((1,), data.numel(), dtype=torch.int64, device=data.device)]
    flags = []
    if num_whole:
        sums, bad = _sums_of_chunks(whole.view(num_whole, CHUNK_WORDS), weights, dtype)
        terms.append(sums)
        flags.append(bad)
    if rest.numel():
        terms.append(_weighted_sum(rest, weights[: rest.numel()])[None])
        flags.append(None if dtype is None else _is_nonfinite(rest, dtype)[None])
    polynomial = torch.cat(terms)
    found = None if dtype is None else torch.cat([flag for flag in flags if flag is not None])
    return (polynomial * _powers(data.device, len(polynomial))).sum(), found


class FiniteChecksums:
    """The checksums of an update's buckets, and which tensors in them are not finite.

    Where all tensors have one type, both come from one pass over the data. Else tensors are read
    once more, because a chunk may hold words of several types.

    Args:
        buckets: of every update.
    """

    def __init__(self, buckets: Sequence[Bucket]):
        dtypes = {meta.dtype for bucket in buckets for meta in bucket.tensors}
        self._buckets = buckets
        self._dtype = DTYPES[dtypes.pop()] if len(dtypes) == 1 else None
        self._flags: list[Tensor] = []

    def add(self, bucket: Bucket, data: Tensor) -> Tensor:
        """The checksum of the next bucket of an update, as `checksum`."""
        if bucket.index == 0:
            self._flags = []
        number, flags = _checksum(data, self._dtype)
        if flags is None:
            flags = torch.stack([_has_nonfinite(view) for _, view in bucket.views(data)])
        self._flags.append(flags)
        return number

    def nonfinite(self) -> list[str]:
        """Names of the tensors of the last update that are not finite; waits for the device.

        With tensors of one type, those that share a chunk of 1 MiB with such a number.
        """
        if not torch.cat(self._flags).any():
            return []
        return [
            meta.name
            for bucket, flags in zip(self._buckets, self._flags, strict=True)
            for number, (meta, start) in enumerate(zip(bucket.tensors, bucket.offsets, strict=True))
            if flags[self._places(number, start, meta.nbytes)].any()
        ]

    def _places(self, number: int, start: int, nbytes: int) -> slice:
        """The flags of a tensor of a bucket."""
        if self._dtype is None:
            return slice(number, number + 1)
        chunk = 4 * CHUNK_WORDS
        return slice(start // chunk, (start + max(nbytes, 1) - 1) // chunk + 1)


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


def _weighted_sum_and_flag(words: Tensor, weights: Tensor, high: int, low: int) -> list[Tensor]:
    """Sums, and whether a number in the words has an exponent of ones only: NaN or infinite."""
    bad = ((words & high) == high) | ((words & low) == low)
    return [_weighted_sum(words, weights), bad.any(dim=-1)]


_fused_weighted_sum = functools.cache(functools.partial(torch.compile, _weighted_sum, dynamic=True))
_fused_sum_and_flag = functools.cache(
    functools.partial(torch.compile, _weighted_sum_and_flag, dynamic=True)
)
EXPONENTS = {
    torch.float32: (0x7F800000, 0x7F800000),
    torch.bfloat16: (0x7F800000, 0x7F80),
    torch.float16: (0x7C000000, 0x7C00),
}
"""Bits of the exponents of the numbers in a 32-bit word: of the upper half, and of the lower."""


def _sums_of_chunks(
    chunks: Tensor, weights: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """[chunks, words] int32 -> [chunks] int64, and [chunks] bool if `dtype` says what they hold."""
    if chunks.device.type == "cpu":
        sums, flags = [], []
        # One temporary for all: each new one may be new pages of the system, which takes ten times
        # as long as the arithmetic.
        product = torch.empty_like(weights)
        for chunk in chunks:
            sums.append(product.copy_(chunk).mul_(weights).sum())
            if dtype is not None:  # now, while the chunk is in the cache
                flags.append(_is_nonfinite(chunk, dtype))
        return torch.stack(sums), torch.stack(flags) if flags else None
    # One kernel reads each word once; single ops would move five times as many bytes.
    if dtype is None:
        return _fused_weighted_sum()(chunks, weights), None
    both = _fused_sum_and_flag()(chunks, weights, *EXPONENTS[dtype])
    return both[0], both[1]


def _is_nonfinite(words: Tensor, dtype: torch.dtype) -> Tensor:
    """0-dim bool: whether [words] int32, which hold numbers of type `dtype`, are not all finite."""
    return _has_nonfinite(words.view(dtype))


def _has_nonfinite(values: Tensor) -> Tensor:
    """0-dim bool; on CPU by a sum, which is cheaper and passes on what is not finite."""
    if values.device.type == "cpu" and values.sum().isfinite():
        return torch.tensor(False)
    return ~values.isfinite().all()


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
