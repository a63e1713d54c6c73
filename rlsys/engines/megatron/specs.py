"""The megatron-core modules of each layer on this rank: Transformer Engine's, or torch's on CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from rlsys.engines.megatron.gated_attention import GatedAttention
from rlsys.engines.megatron.gated_delta import GatedDeltaNet
from rlsys.engines.megatron.latent import ReplicatedLinear
from rlsys.engines.megatron.layers import PackedAttention, RMSNorm
from rlsys.engines.megatron.norms import AllHeadsNorm
from rlsys.model.attention import attends_by_torch
from rlsys.model.families.base import LayerShape
from rlsys.model.shape import ModelShape


def block_spec(
    config: TransformerConfig, shape: ModelShape, *, vp_stage: int | None, on_cpu: bool
) -> TransformerBlockSubmodules:
    """The modules of the layers of a pipeline stage of this rank, and the final norm.

    Args:
        vp_stage: its number on this rank; None where the rank has one stage.
    """
    # Transformer Engine has no CPU kernels, so a GPU host that runs on its CPU does without it.
    if not on_cpu and importlib.util.find_spec("transformer_engine") is not None:
        from megatron.core.extensions.transformer_engine import TENorm

        make_layer, norm = _transformer_engine_layer, TENorm
    else:
        make_layer, norm = _torch_layer, RMSNorm
    first = get_transformer_layer_offset(config, vp_stage)
    layers = shape.layers[first : first + get_num_layers_to_build(config, vp_stage)]
    specs = []
    for layer in layers:
        spec = make_layer(config, layer)
        if attends_by_torch(shape, config.attention_backend.name):
            spec.submodules.self_attention.submodules.core_attention = PackedAttention
        if layer.is_linear:
            _make_linear(spec, shape, norm)
        elif config.multi_latent_attention:
            spec.submodules.self_attention.module = LatentSelfAttention
        elif shape.family.has_output_gate:
            spec.submodules.self_attention.module = GatedAttention
        _place_norms(spec, config, shape, norm)
        if shape.family.qk_norm_of_all_heads:
            attention = spec.submodules.self_attention.submodules
            for name, heads in (("q", shape.num_heads), ("k", shape.num_kv_heads)):
                heads_norm = ModuleSpec(module=AllHeadsNorm, params={"num_heads": heads})
                setattr(attention, f"{name}_layernorm", heads_norm)
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _transformer_engine_layer(config: TransformerConfig, layer: LayerShape) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if layer.has_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )


def _torch_layer(config: TransformerConfig, layer: LayerShape) -> ModuleSpec:
    """A layer of torch's RMSNorm and SDPA; a rank's experts run one after the other.

    The norm of megatron-core's own local spec refuses sequence parallelism, its attention packed
    sequences.
    """
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if layer.has_experts else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.multi_latent_attention:
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
        attention.linear_q_down_proj = attention.linear_kv_down_proj = ReplicatedLinear
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _make_linear(spec: ModuleSpec, shape: ModelShape, norm: type) -> None:
    """Put linear attention in the place of a layer's attention, behind a norm of its own."""
    attention = spec.submodules.self_attention.submodules
    if "LayerNorm" in attention.linear_qkv.__name__:
        spec.submodules.input_layernorm = norm
        _unfuse(attention, "linear_qkv")
    spec.submodules.self_attention = ModuleSpec(
        module=GatedDeltaNet,
        params={
            "sizes": shape.linear,
            "column": attention.linear_qkv,
            "row": attention.linear_proj,
        },
    )


def _place_norms(
    spec: ModuleSpec, config: TransformerConfig, shape: ModelShape, norm: type
) -> None:
    """Give a layer with norms before attention and MLP the places that the family has."""
    place, modules = shape.family.norms, spec.submodules
    if place in ("post", "sandwich"):
        add = ModuleSpec(module=NormedAdd, params={"config": config, "norm": norm})
        modules.self_attn_bda = modules.mlp_bda = add
    if place == "post":
        modules.input_layernorm = modules.pre_mlp_layernorm = IdentityOp
        _unfuse(modules.self_attention.submodules, "linear_qkv")
        mlp = modules.mlp  # megatron-core 0.19 has a partial where 0.16 has a ModuleSpec
        _unfuse(
            mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules, "linear_fc1"
        )


def _unfuse(submodules: Any, name: str) -> None:
    """Replace Transformer Engine's fusion of a norm and a linear layer by the linear layer."""
    if "LayerNorm" in getattr(submodules, name).__name__:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        setattr(submodules, name, TEColumnParallelLinear)


class LatentSelfAttention(MLASelfAttention):
    """Latent attention whose queries have a norm only where they come from a smaller vector.

    megatron-core 0.19 fuses a norm with the projection of queries whenever keys and values have
    one; without q_lora_rank the model has none there.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        classes = super()._resolve_qk_norm_config(submodules)
        if self.config.q_lora_rank is None:
            classes = classes | {"linear_q_proj": submodules.linear_q_proj}
        return classes


class NormedAdd(torch.nn.Module):
    """residual + norm(x): megatron-core's bias-dropout-add with a norm before the addition."""

    def __init__(self, config: TransformerConfig, norm: type):
        super().__init__()
        self.norm = norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """A function of ((x, bias), residual, dropout), as megatron-core calls it."""

        def add(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None],
            residual: torch.Tensor,
            dropout: float,
        ) -> torch.Tensor:
            x, bias = x_with_bias
            assert dropout == 0.0, dropout
            return residual + self.norm(x if bias is None else x + bias)

        return add
