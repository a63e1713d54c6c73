"""Sums, means and maxima over the sequences of a packed micro-batch, with gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def masked_sum(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """A statistic: the sum over trained tokens, without gradient."""
    # float64, so that the result does not depend on how tokens are split.
    return values_T.detach().masked_fill(~mask_T, 0).sum(dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Segments:
    """Which of B sequences each of T packed tokens is in.

    A sequence is never split over micro-batches. The filling tokens at the end are a sequence, too:
    masked, so that it sums to 0.
    """

    ids_T: Tensor
    """[T] int64, 0 to B - 1."""
    num_sequences: int
    """B."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, num_tokens: int) -> Segments:
        """From [B + 1] starts and the last end, see `PackedMicroBatch.cu_seqlens`."""
        lengths_B = cu_seqlens.diff().long()
        sequences_B = torch.arange(len(lengths_B), device=cu_seqlens.device)
        # With output_size a GPU need not report to the host.
        ids_T = torch.repeat_interleave(sequences_B, lengths_B, output_size=num_tokens)
        return cls(ids_T=ids_T, num_sequences=len(lengths_B))

    def sums(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """[T] at tokens -> [T]: every token gets its sequence's sum over unmasked tokens."""
        # float64, so that rounding does not depend on the order of addition.
        kept_T = values_T.masked_fill(~mask_T, 0).double()
        sums_B = kept_T.new_zeros(self.num_sequences).index_add(0, self.ids_T, kept_T)
        return sums_B[self.ids_T].to(torch.promote_types(values_T.dtype, torch.float32))

    def maxima(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """[T] at tokens -> [T]: the greatest unmasked value of its sequence, -inf without any."""
        kept_T = values_T.masked_fill(~mask_T, -torch.inf)
        lowest_B = kept_T.new_full((self.num_sequences,), -torch.inf)
        return lowest_B.scatter_reduce(0, self.ids_T, kept_T, "amax")[self.ids_T]

    def means(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """Divide `sums` by the sequence's unmasked tokens; 0 without any."""
        return self.sums(values_T, mask_T) / self.sums(mask_T, mask_T).clamp(min=1)
