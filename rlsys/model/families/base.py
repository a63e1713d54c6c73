"""What a model family says about its models, and the weight table that all families share.

megatron-core fuses tensors that Hugging Face keeps apart: q, k and v into `linear_qkv`, interleaved
by query group; gate and up into `linear_fc1`. The table has one row for each megatron-core
parameter of the whole model, each expert included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rlsys.model.shape import ModelShape

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class WeightRow:
    """One megatron-core parameter and the Hugging Face tensors it consists of."""

    names: tuple[str, ...]
    """Its name, with layers and experts numbered over the whole model. A second one is its name
    in Transformer Engine's layers, where that differs."""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    tp_axis: int | None = None
    """The axis of the Hugging Face tensors that tensor parallelism cuts; None: replicated."""
    query_groups: int = 0
    """In linear_qkv: the query groups of the whole model, by which q, k and v are interleaved."""
    experts: str | None = None
    """In an expert's parameter: a name that it shares with the same parameter of the layer's other
    experts. They follow each other in the table, and expert-parallel ranks hold equal parts, in the
    order of the ranks."""

    @property
    def num_params(self) -> int:
        """Numbers in all its tensors."""
        return sum(map(math.prod, self.hf_shapes))

    def in_layer(self, layer: int) -> WeightRow:
        """The same row with the names that it has in layer number `layer`."""
        prefix = f"decoder.layers.{layer}."
        return replace(
            self,
            names=tuple(prefix + name for name in self.names),
            hf_names=tuple(f"model.layers.{layer}.{name}" for name in self.hf_names),
            experts=self.experts and prefix + self.experts,
        )

    def fuse(self, parts: list[torch.Tensor], tp_size: int) -> torch.Tensor:
        """One rank's slices of the Hugging Face tensors -> its megatron-core parameter."""
        import torch  # preflight reads names and shapes without it

        if not self.query_groups:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        groups = self.query_groups // tp_size
        return torch.cat(
            [part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1
        ).flatten(0, 1)

    def split(self, fused: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
        """One rank's megatron-core parameter -> its slices of the Hugging Face tensors."""
        views = self.views(fused, tp_size)
        return [view.flatten(0, 1) for view in views] if self.query_groups else views

    def views(self, fused: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
        """`split` without a copy: q, k and v get a first axis of query groups."""
        if len(self.hf_names) == 1:
            return [fused]
        rows = [shape[0] // tp_size for shape in self.hf_shapes]
        if not self.query_groups:
            return list(fused.split(rows))
        groups = self.query_groups // tp_size
        by_group = fused.view(groups, -1, *fused.shape[1:])
        return list(by_group.split([r // groups for r in rows], dim=1))


def gated_mlp(shape: ModelShape) -> list[WeightRow]:
    """Rows of a layer's MLP: down(silu(gate(x)) * up(x))."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    return [
        WeightRow(
            ("mlp.linear_fc1.weight",),
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
            tp_axis=0,
        ),
        WeightRow(
            ("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",), ((hidden, ffn),), tp_axis=1
        ),
    ]


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """What is specific to the models of one model_type; `rlsys.model.keys` has what all share."""

    model_type: str
    architecture: str
    """The class that vLLM builds: it reads `architectures`, not model_type."""
    sizes: tuple[str, ...] = ()
    """Further keys of config.json that are whole numbers of at least 1."""
    keys: tuple[str, ...] = ()
    """Further keys of config.json that rlsys implements."""
    inert: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key of config.json -> the values with which it changes nothing in this family."""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """What transformers and vLLM take for sizes that config.json leaves out."""
    heads_divide_hidden: bool = False
    """Whether transformers refuses another number of heads even if config.json has head_dim."""
    has_qkv_bias: bool = False
    """Whether q, k and v have a bias, which config.json may not say."""
    has_qk_norm: bool = False
    """Whether q and k are normalised by head."""
    mlp: Callable[[ModelShape], list[WeightRow]] = gated_mlp
    """Rows of the second half of a layer, with names relative to the layer."""
    own_sizes: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda values: {}
    """config.json -> further fields of its ModelShape; raises ValueError and KeyError."""

    def layer(self, shape: ModelShape) -> list[WeightRow]:
        """Rows of one decoder layer, with names relative to the layer, in the model's order."""
        hidden, head_dim, groups = shape.hidden_size, shape.head_dim, shape.num_kv_heads
        q, kv = shape.num_heads * head_dim, groups * head_dim
        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        rows = [
            WeightRow(
                ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
                ("input_layernorm.weight",),
                ((hidden,),),
            ),
            WeightRow(
                ("self_attention.linear_qkv.weight",),
                tuple(f"{name}.weight" for name in qkv),
                ((q, hidden), (kv, hidden), (kv, hidden)),
                tp_axis=0,
                query_groups=groups,
            ),
            WeightRow(
                ("self_attention.linear_proj.weight",),
                ("self_attn.o_proj.weight",),
                ((hidden, q),),
                tp_axis=1,
            ),
        ]
        if self.has_qkv_bias:
            rows.append(
                WeightRow(
                    ("self_attention.linear_qkv.bias",),
                    tuple(f"{name}.bias" for name in qkv),
                    ((q,), (kv,), (kv,)),
                    tp_axis=0,
                    query_groups=groups,
                )
            )
        if self.has_qk_norm:
            rows += [
                WeightRow(
                    (f"self_attention.{x}_layernorm.weight",),
                    (f"self_attn.{x}_norm.weight",),
                    ((head_dim,),),
                )
                for x in "qk"
            ]
        norm = WeightRow(
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            ("post_attention_layernorm.weight",),
            ((hidden,),),
        )
        return [*rows, norm, *self.mlp(shape)]


def weight_table(shape: ModelShape) -> list[WeightRow]:
    """Every parameter of a model, in the order of the model."""
    embedding_shape = (shape.vocab_size, shape.hidden_size)
    layer = shape.family.layer(shape)
    norm = (("decoder.final_layernorm.weight",), ("model.norm.weight",), ((shape.hidden_size,),))
    rows = [
        WeightRow((EMBEDDING,), (HF_EMBEDDING,), (embedding_shape,), tp_axis=0),
        *(row.in_layer(number) for number in range(shape.num_layers) for row in layer),
        WeightRow(*norm),
    ]
    if not shape.tied:
        rows.append(WeightRow((OUTPUT,), (HF_OUTPUT,), (embedding_shape,), tp_axis=0))
    return rows
