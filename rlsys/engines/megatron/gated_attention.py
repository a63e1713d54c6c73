"""Attention whose output a gate weighs: the query projection gives each head's gate, too."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention


class GatedAttention(SelfAttention):
    """megatron-core's gated attention, with queries and gates in the order of Hugging Face.

    There a head's query is followed by its gate; megatron-core wants all queries of a group of
    heads, then all gates. Rows of a checkpoint would have to be sorted for that in each weight
    sync. Sorting activations is a view.
    """

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *_: Any, output_gate: bool = True, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        """[T / sp, 1, H] -> queries, keys, values and gates [T, 1, heads, d]."""
        assert output_gate, "see attention_output_gate"
        mixed, _ = self.linear_qkv(hidden_states)
        size = self.hidden_size_per_attention_head
        by_group = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        width = by_group.shape[-1] - 2 * size
        both, key, value = by_group.split((width, size, size), dim=-1)
        query, gate = both.unflatten(-1, (-1, 2, size)).flatten(2, 3).unbind(-2)
        query = query.contiguous()
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key.contiguous())
        return query, key, value, gate
