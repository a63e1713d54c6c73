"""Sums and means over a packed micro-batch: of each sequence, with gradient, and of all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def masked_sum(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """A statistic: the sum over trained tokens."""
    # float64, so that how tokens are split over micro-batches and ranks does not show.
    return values_T.detach().masked_fill(~mask_T, 0).sum(dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Segments:
    """Which of T packed tokens are of one sequence, B sequences in all.

    A sequence is never split over micro-batches, so what is reduced here is whole. The sequence of
    filling tokens at the end is one of them: its tokens are masked, so that it sums to 0.
    """

    ids_T: Tensor
    """[T] int64, 0 to B - 1."""
    num_sequences: int
    """B."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, num_tokens: int) -> Segments:
        """From [B + 1] starts and end, as attention takes them."""
        lengths_B = cu_seqlens.diff().long()
        sequences_B = torch.arange(len(lengths_B), device=cu_seqlens.device)
        # With its size known, no device has to tell the host.
        ids_T = torch.repeat_interleave(sequences_B, lengths_B, output_size=num_tokens)
        return cls(ids_T=ids_T, num_sequences=len(lengths_B))

    def sums(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """[T] at tokens -> [T]: every token gets its sequence's sum over unmasked tokens."""
        # float64, so that rounding does not depend on the order of addition.
        kept_T = values_T.masked_fill(~mask_T, 0).double()
        sums_B = kept_T.new_zeros(self.num_sequences).index_add(0, self.ids_T, kept_T)
        return sums_B[self.ids_T].to(torch.promote_types(values_T.dtype, torch.float32))

    def maxima(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """[T] at tokens -> [T]: its sequence's greatest unmasked value; -inf where it has none."""
        kept_T = values_T.masked_fill(~mask_T, -torch.inf)
        lowest_B = kept_T.new_full((self.num_sequences,), -torch.inf)
        return lowest_B.scatter_reduce(0, self.ids_T, kept_T, "amax")[self.ids_T]

    def means(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """As `sums`, divided by the unmasked tokens of the sequence; 0 where it has none."""
        return self.sums(values_T, mask_T) / self.sums(mask_T, mask_T).clamp(min=1)
