"""Layers without Transformer Engine: torch's RMSNorm, and SDPA on packed sequences."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

from rlsys.algo.context_parallel import chunk_positions, gather_tokens

QUERY_BLOCK = 512
"""Fewest queries of a sliding window that attend in one call."""


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose gradient megatron-core sums over the sequence-parallel ranks.

    Zero-centred, its product with 1 + weight is in float32, as in Transformer Engine.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> the same."""
        if not self.zero_centered:
            return super().forward(x)
        normed = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class PaddedRows:
    """Packed sequences [T, ...] as right-padded rows [N, S, ...], and back.

    What is causal needs no mask for them: no real token sees the padding on its right.
    """

    def __init__(self, cu_seqlens: torch.Tensor):
        cu_seqlens = cu_seqlens.long()
        lengths = cu_seqlens.diff()
        self._rows = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths
        )
        self._columns = torch.arange(len(self._rows), device=lengths.device)
        self._columns = self._columns - cu_seqlens[self._rows]
        self._shape = (len(lengths), int(lengths.max()))

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [N, S, ...]."""
        padded = packed.new_zeros(*self._shape, *packed.shape[1:])
        return padded.index_put((self._rows, self._columns), packed)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """[N, S, ...] -> [T, ...]."""
        return padded[self._rows, self._columns]


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences, with grouped queries and sliding windows.

    All sequences of a micro-batch attend in one call, as `PaddedRows`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: Any,
        softmax_scale: float | None = None,
        **__: Any,
    ):
        super().__init__(config)
        self.softmax_scale = softmax_scale
        self.window: int | None = None
        """Tokens that a query attends to, its own included."""
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            self.window = config.window_size[0] + 1

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> torch.Tensor:
        """[T, heads, d] queries, [T, kv_heads, d] keys and values -> [T, heads * d].

        Under context parallelism T is this rank's number of tokens. Each rank gathers all tokens
        and computes everything, which is exact and saves nothing.
        """
        assert attention_mask is None, "packed sequences are causal by construction"
        group = parallel_state.get_context_parallel_group()
        positions = chunk_positions(packed_seq_params.cu_seqlens_q, group.size())
        query, key, value = (
            gather_tokens(packed, positions, group, sum_gradients=True)
            for packed in (query, key, value)
        )
        rows = PaddedRows(packed_seq_params.cu_seqlens_q)
        padded = (rows.pad(packed).transpose(1, 2) for packed in (query, key, value))
        attended = rows.unpad(self._padded(*padded).transpose(1, 2)).flatten(1)
        return attended if group.size() == 1 else attended[positions[group.rank()]]

    def _padded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[N, heads, S, d] queries, [N, kv_heads, S, d] keys and values -> [N, heads, S, d].

        In a window that is shorter than S, a block of queries attends to the keys that any of them
        sees, so that the mask is not [S, S].
        """
        attend = functools.partial(
            F.scaled_dot_product_attention,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        length, window = query.size(2), self.window
        if window is None or window >= length:
            return attend(query, key, value, is_causal=True)
        block = max(window, QUERY_BLOCK)
        attended = []
        for start in range(0, length, block):
            end, first = min(start + block, length), max(start - window + 1, 0)
            at = torch.arange(first, end, device=query.device)
            distance = at[start - first :, None] - at
            attended.append(
                attend(
                    query[:, :, start:end],
                    key[:, :, first:end],
                    value[:, :, first:end],
                    attn_mask=(distance >= 0) & (distance < window),
                )
            )
        return torch.cat(attended, dim=2)
