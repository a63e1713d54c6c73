"""Layers of linear attention (gated DeltaNet) beside layers of gated attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsys.model.families.base import LayerShape, WeightRow, attention

if TYPE_CHECKING:
    from rlsys.model.shape import ModelShape

HYBRID = ("linear_attention", "full_attention")
"""What layer_types of config.json names."""
LINEAR_SIZES = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "full_attention_interval",
)
LINEAR_DEFAULTS = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "full_attention_interval": 4,
}


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """Sizes of the gated DeltaNet layers of one model."""

    key_heads: int
    value_heads: int
    """A multiple of `key_heads`: each key head serves as many value heads."""
    key_dim: int
    value_dim: int
    kernel: int
    """Tokens that the causal convolution of queries, keys and values sees."""

    @property
    def key_size(self) -> int:
        """Numbers in the keys of a token."""
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        """Numbers in the values of a token."""
        return self.value_heads * self.value_dim

    @property
    def qkvz(self) -> int:
        """Numbers in queries, keys, values and output gates of a token."""
        return 2 * self.key_size + 2 * self.value_size

    @property
    def state_elements(self) -> int:
        """Numbers that a sequence of any length leaves: inputs of the convolution, and states."""
        convolved = (2 * self.key_size + self.value_size) * (self.kernel - 1)
        return convolved + self.value_size * self.key_dim


def read_linear_attention(values: Mapping[str, Any]) -> LinearAttention:
    """config.json -> the sizes of its linear layers.

    Raises:
        ValueError: value heads cannot share the key heads equally.
    """
    key_heads, value_heads = values["linear_num_key_heads"], values["linear_num_value_heads"]
    if value_heads % key_heads:
        raise ValueError(
            f"linear_num_key_heads = {key_heads} does not divide linear_num_value_heads = "
            f"{value_heads}"
        )
    return LinearAttention(
        key_heads,
        value_heads,
        values["linear_key_head_dim"],
        values["linear_value_head_dim"],
        values["linear_conv_kernel_dim"],
    )


def hybrid_layer_types(values: Mapping[str, Any]) -> list[str]:
    """layer_types of config.json; without it every full_attention_interval-th layer is full."""
    given = values.get("layer_types")
    if given:
        return list(given)
    interval, layers = values["full_attention_interval"], values["num_hidden_layers"]
    return [HYBRID[(number + 1) % interval == 0] for number in range(layers)]


def linear_or_gated(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """Rows of a layer's attention, of either kind, as Qwen3-Next has them."""
    return _linear(shape, _interleaved(shape)) if layer.is_linear else attention(shape, layer)


def linear_in_parts(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """The same as Qwen3.5 has them, where projections are tensors of their own."""
    return _linear(shape, _in_parts(shape)) if layer.is_linear else attention(shape, layer)


def _interleaved(shape: ModelShape) -> list[WeightRow]:
    """Projections whose rows a checkpoint has by key head: q, k, v, z; and b, a."""
    sizes, hidden = shape.linear, shape.hidden_size
    assert sizes is not None
    return [
        WeightRow(
            ("self_attention.in_proj_qkvz.weight",),
            ("linear_attn.in_proj_qkvz.weight",),
            ((sizes.qkvz, hidden),),
            tp_axis=0,
        ),
        WeightRow(
            ("self_attention.in_proj_ba.weight",),
            ("linear_attn.in_proj_ba.weight",),
            ((2 * sizes.value_heads, hidden),),
            tp_axis=0,
        ),
    ]


def _in_parts(shape: ModelShape) -> list[WeightRow]:
    """The same projections from all q, then all k, ...: the parameter has them by key head."""
    sizes, hidden = shape.linear, shape.hidden_size
    assert sizes is not None
    qkv = (sizes.key_size, sizes.key_size, sizes.value_size)
    return [
        WeightRow(
            ("self_attention.in_proj_qkvz.weight",),
            ("linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"),
            ((sum(qkv), hidden), (sizes.value_size, hidden)),
            tp_axis=0,
            query_groups=sizes.key_heads,
            part_rows=(*qkv, sizes.value_size),
        ),
        WeightRow(
            ("self_attention.in_proj_ba.weight",),
            ("linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight"),
            ((sizes.value_heads, hidden),) * 2,
            tp_axis=0,
            query_groups=sizes.key_heads,
        ),
    ]


def _linear(shape: ModelShape, projections: list[WeightRow]) -> list[WeightRow]:
    sizes, hidden, place = shape.linear, shape.hidden_size, "self_attention."
    assert sizes is not None
    convolved = (sizes.key_size, sizes.key_size, sizes.value_size)
    heads = (sizes.value_heads,)
    return [
        *projections,
        WeightRow(
            (f"{place}conv1d.weight",),
            ("linear_attn.conv1d.weight",),
            ((sum(convolved), 1, sizes.kernel),),
            tp_axis=0,
            part_rows=convolved,
        ),
        WeightRow((f"{place}dt_bias",), ("linear_attn.dt_bias",), (heads,), tp_axis=0),
        WeightRow((f"{place}A_log",), ("linear_attn.A_log",), (heads,), tp_axis=0, dtype="float32"),
        WeightRow((f"{place}norm_weight",), ("linear_attn.norm.weight",), ((sizes.value_dim,),)),
        WeightRow(
            (f"{place}out_proj.weight",),
            ("linear_attn.out_proj.weight",),
            ((hidden, sizes.value_size),),
            tp_axis=1,
        ),
    ]
