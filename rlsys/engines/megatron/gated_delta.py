"""Gated DeltaNet (arXiv:2412.06464) on packed sequences, in plain torch: linear attention layers.

megatron-core's own module refuses packed sequences, so this one serves on GPUs too. It is exact and
slow there: a chunk of a sequence is a few small matrix products, one chunk after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from rlsys.algo.context_parallel import chunk_positions, gather_tokens
from rlsys.engines.megatron.layers import PaddedRows
from rlsys.model.families.linear import LinearAttention
from rlsys.model.layer_memory import LINEAR_CHUNK_TOKENS

_NORM_EPS = 1e-6
"""Epsilon of the L2 norm of queries and keys, in every model."""


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """[N, heads, S, dv] outputs of the recurrence of each head (equation 10 of the paper).

    The state decays, S' = exp(decay_t) S_{t-1}; then S_t = S' + beta_t k_t (v_t - S'^T k_t)^T and
    o_t = S_t^T q_t, from S_0 = 0. Within a chunk, what the tokens add to the state is the solution
    of one triangular system, instead of a loop over tokens.

    Args:
        query, key: [N, heads, S, dk] float32.
        value: [N, heads, S, dv] float32.
        decay: [N, heads, S] logarithms, at most 0.
        beta: [N, heads, S], how far a token overwrites what the state has for its key.
    """
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    outputs = []
    for q, k, v, g, b in zip(
        *(x.split(LINEAR_CHUNK_TOKENS, dim=2) for x in (query, key, value, decay, beta)),
        strict=True,
    ):
        total = g.cumsum(-1)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
        system = b[..., None] * (k @ k.mT) * between
        wanted = b[..., None] * (v - total.exp()[..., None] * (k @ state))
        added = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append(total.exp()[..., None] * (q @ state) + ((q @ k.mT) * between) @ added)
        left = (total[..., -1:] - total).exp()
        state = total[..., -1, None, None].exp() * state + (left[..., None] * k).mT @ added
    return torch.cat(outputs, dim=2)


class GatedDeltaNet(MegatronModule):
    """A layer of linear attention, in place of megatron-core's self-attention.

    Tensor-parallel ranks have equal parts of the key heads, each with its value heads. Under
    context parallelism each rank gathers all tokens and computes everything, which is exact and
    saves nothing.

    Args:
        sizes: of the whole model's heads.
        column, row: megatron-core's classes of linear layers that are cut over ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        sizes: LinearAttention,
        column: type,
        row: type,
        pg_collection: Any = None,
        **_: Any,
    ):
        super().__init__(config)
        self.sizes, self.layer_number = sizes, layer_number
        ranks = config.tensor_model_parallel_size
        self.key_heads = sizes.key_heads // ranks
        self.value_heads = sizes.value_heads // ranks
        shared = dict(config=config, bias=False, is_expert=False)
        if pg_collection is not None:
            shared["tp_group"] = pg_collection.tp
        into = dict(shared, init_method=config.init_method, gather_output=False)
        into["skip_bias_add"] = False
        self.in_proj_qkvz = column(
            config.hidden_size, sizes.qkvz, tp_comm_buffer_name="qkv", **into
        )
        self.in_proj_ba = column(
            config.hidden_size, 2 * sizes.value_heads, tp_comm_buffer_name="fc1", **into
        )
        self.out_proj = row(
            sizes.value_size,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **shared,
        )
        like = dict(device=torch.cuda.current_device(), dtype=config.params_dtype)
        channels = (2 * sizes.key_size + sizes.value_size) // ranks
        self.conv1d = torch.nn.Conv1d(
            channels, channels, sizes.kernel, groups=channels, bias=False, **like
        )
        self.dt_bias = torch.nn.Parameter(torch.empty(self.value_heads, **like))
        # exp(A_log) decides for how long a state lasts: float32, as in vLLM.
        self.A_log = torch.nn.Parameter(
            torch.empty(self.value_heads, **(like | {"dtype": torch.float32}))
        )
        self.norm_weight = torch.nn.Parameter(torch.empty(sizes.value_dim, **like))
        # Every rank has it whole, and the gradient of its own heads.
        self.norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[T / sp, 1, H] -> the same; the state is 0 at the start of every sequence."""
        assert attention_mask is None, "packed sequences are causal by construction"
        sizes, ratio = self.sizes, self.value_heads // self.key_heads
        by_head = self.in_proj_qkvz(hidden_states)[0].unflatten(-1, (self.key_heads, -1))
        wide = ratio * sizes.value_dim
        q, k, v, z = by_head.squeeze(1).split((sizes.key_dim, sizes.key_dim, wide, wide), dim=-1)
        ba = self.in_proj_ba(hidden_states)[0].unflatten(-1, (self.key_heads, 2, ratio)).squeeze(1)
        mixed = torch.cat([x.flatten(1) for x in (q, k, v, ba)], dim=-1)

        group = parallel_state.get_context_parallel_group()
        positions = chunk_positions(packed_seq_params.cu_seqlens_q, group.size())
        mixed = gather_tokens(mixed, positions, group, sum_gradients=True)
        rows = PaddedRows(packed_seq_params.cu_seqlens_q)
        attended = rows.unpad(self._attend(rows.pad(mixed)))
        if group.size() > 1:
            attended = attended[positions[group.rank()]]
        attended = self._gated_norm(attended, z.reshape(attended.shape))
        return self.out_proj(attended.flatten(1)[:, None])

    def _attend(self, mixed: torch.Tensor) -> torch.Tensor:
        """[N, S, channels + 2 heads] rows, padded on the right -> [N, S, value heads, dv]."""
        sizes, ratio = self.sizes, self.value_heads // self.key_heads
        channels = self.conv1d.weight.shape[0]
        qkv, ba = mixed.split((channels, mixed.shape[-1] - channels), dim=-1)
        convolved = self.conv1d(F.pad(qkv.mT, (sizes.kernel - 1, 0)))
        sides = (self.key_heads * sizes.key_dim,) * 2 + (self.value_heads * sizes.value_dim,)
        q, k, v = F.silu(convolved).mT.split(sides, dim=-1)
        b, a = (x.flatten(-2) for x in ba.unflatten(-1, (self.key_heads, 2, ratio)).unbind(-2))
        beta = b.sigmoid().float()
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)

        def heads(x: torch.Tensor, size: int) -> torch.Tensor:
            return x.unflatten(-1, (-1, size)).transpose(1, 2).float()

        q, k = (_normalised(heads(x, sizes.key_dim)) for x in (q, k))
        q, k = (x.repeat_interleave(ratio, dim=1) for x in (q * sizes.key_dim**-0.5, k))
        attended = gated_delta_rule(q, k, heads(v, sizes.value_dim), decay.mT, beta.mT)
        return attended.transpose(1, 2).to(mixed.dtype)

    def _gated_norm(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normalised = F.rms_norm(x.float(), x.shape[-1:], eps=self.config.layernorm_epsilon)
        return (self.norm_weight * normalised.to(x.dtype) * F.silu(gate.float())).to(x.dtype)


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)
