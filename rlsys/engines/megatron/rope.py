"""Rotary embeddings as transformers computes them, in megatron-core's layers.

A model has one table of frequencies for each kind of layer, and layers without any (NoPE).
YaRN and LongRoPE also scale cosine and sine, so the turned part of queries and keys. The fused
kernels have no place for that factor, so the queries get it twice, which gives the same products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlsys.algo.context_parallel import chunk_positions
from rlsys.model.shape import ModelShape


def frequencies(hf: PretrainedConfig, kind: str, *, longest: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [d / 2] of the d turned numbers of a head, and the factor of cos and sin.

    Args:
        kind: the entry of rope_parameters; "" if it has none.
        longest: tokens of the longest row of the run. LongRoPE has other frequencies beyond the
            length that the model was trained with. vLLM decides by the longest row that it may
            get, and so does the policy, while transformers goes by the rows of a batch.
    """
    parameters = hf.rope_parameters[kind] if kind else hf.rope_parameters
    rope_type = parameters["rope_type"]
    if rope_type != "default":
        length = longest if rope_type == "longrope" else None
        return ROPE_INIT_FUNCTIONS[rope_type](hf, seq_len=length, layer_type=kind or None)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    size = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return 1.0 / (parameters["rope_theta"] ** exponents), 1.0


def place_rotary(model: GPTModel, hf: PretrainedConfig, shape: ModelShape, *, longest: int) -> None:
    """Give every layer of `model` its frequencies, and its queries their factors."""
    kinds = sorted({layer.rope for layer in shape.layers if layer.rope is not None})
    tables = {kind: frequencies(hf, kind, longest=longest) for kind in kinds}
    latent = shape.latent
    # In latent attention each layer looks its angles up, and turns the last numbers of a head.
    holders = [model] if latent is None else [each.self_attention for each in model.decoder.layers]
    for holder in holders if kinds else []:
        holder.rotary_pos_emb = Rotary(holder.rotary_pos_emb, [tables[kind][0] for kind in kinds])
    start = 0 if latent is None else latent.qk_nope_head_dim
    for layer in model.decoder.layers:
        layer_shape = shape.layers[layer.layer_number - 1]
        if layer_shape.is_linear:
            continue
        kind = layer_shape.rope
        index = None if kind is None else kinds.index(kind)
        if index is None or len(kinds) > 1:
            choose = partial(_choose, index)
            layer.self_attention.register_forward_pre_hook(choose, with_kwargs=True)
        core = layer.self_attention.core_attention
        inv_freq, factor = tables[kind] if kind is not None else (None, 1.0)
        if inv_freq is not None and factor != 1.0:
            turned = slice(start, start + 2 * len(inv_freq))
            core.register_forward_pre_hook(partial(_scale_turned, turned, factor**2))
        beta = hf.rope_parameters.get("llama_4_scaling_beta")
        if beta is not None:
            original = hf.rope_parameters["original_max_position_embeddings"]
            core.register_forward_pre_hook(
                partial(_scale_by_position, beta, original), with_kwargs=True
            )


class Rotary(RotaryEmbedding):
    """Angles of several rotary embeddings at once, from given inverse frequencies.

    Args:
        plain: megatron-core's own, which this one replaces.
        inv_freqs: [d / 2] of each; the d are equal.
    """

    def __init__(self, plain: RotaryEmbedding, inv_freqs: Sequence[torch.Tensor]):
        torch.nn.Module.__init__(self)
        self.rotary_interleaved, self.cp_group = plain.rotary_interleaved, plain.cp_group
        self.seq_len_interpolation_factor = None
        self.inv_freq = torch.stack(list(inv_freqs)).to(plain.inv_freq.device)

    def forward(self, max_seq_len: int, **_: Any) -> torch.Tensor:
        """Angles [S, 1, 1, d] of positions 0 to S - 1; [kinds, S, 1, 1, d] of several kinds.

        Sequences are packed, so megatron-core looks positions up by itself, under context
        parallelism too.
        """
        self.inv_freq = self.inv_freq.to(torch.cuda.current_device())
        positions = torch.arange(max_seq_len, device=self.inv_freq.device).float()
        angles = positions[:, None] * self.inv_freq[:, None]
        angles = torch.cat((angles, angles), dim=-1)[:, :, None, None]
        return angles.squeeze(0)


def _choose(
    index: int | None, attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a layer its own angles, out of all."""
    angles = kwargs["rotary_pos_emb"]
    if index is None:
        angles = None
    elif angles.dim() == 5:
        angles = angles[index]
    return args, kwargs | {"rotary_pos_emb": angles}


def _scale_turned(
    turned: slice, factor: float, attention: torch.nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Multiply the `turned` numbers of each head of the queries by `factor`."""
    query, *rest = args
    factors = query.new_ones(query.shape[-1])
    factors[turned] = factor
    return (query * factors, *rest)


def _scale_by_position(
    beta: float,
    original: int,
    attention: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Multiply queries at position p by 1 + beta * ln(1 + floor(p / original)), as Llama 4 does."""
    query, *rest = args
    cu_seqlens = kwargs["packed_seq_params"].cu_seqlens_q
    group = parallel_state.get_context_parallel_group()
    packed = chunk_positions(cu_seqlens, group.size())[group.rank()].to(query.device)
    sequence = torch.searchsorted(cu_seqlens, packed.to(cu_seqlens.dtype), right=True) - 1
    positions = packed - cu_seqlens[sequence]
    factors = 1 + beta * torch.log1p(torch.floor(positions / original))
    return (query * factors[:, None, None].to(query.dtype), *rest), kwargs
