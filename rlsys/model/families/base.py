"""What a model family says about its models, and the weight table that all families share.

megatron-core fuses tensors that Hugging Face keeps apart: q, k and v into `linear_qkv`, interleaved
by query group; gate and up into `linear_fc1`. The table has one row for each megatron-core
parameter of the whole model, each expert included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

    from rlsys.model.shape import ModelShape

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
SCORE = "score.weight"
"""The head of a sequence classifier, under both names."""
WINDOW_TYPES = ("full_attention", "sliding_attention")
"""Kinds of layers in layer_types, and entries of rope_parameters that has one for each kind."""
Norms = Literal["pre", "post", "sandwich"]
_HF_NORMS: dict[Norms, tuple[tuple[str, str], tuple[str, str]]] = {
    "pre": (("input_layernorm", ""), ("post_attention_layernorm", "")),
    "post": (("", "post_attention_layernorm"), ("", "post_feedforward_layernorm")),
    "sandwich": (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
"""Names of the norms before and after attention, before and after the MLP."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What may differ between the decoder layers of one model."""

    has_experts: bool = False
    """Whether its MLP is a mixture of experts."""
    is_linear: bool = False
    """Whether its attention is linear: a state of constant size, and no keys and values to keep."""
    rope: str | None = ""
    """The entry of rope_parameters that its rotary embedding has; "" if rope_parameters has no
    entries for kinds of layers, None if the layer has no rotary embedding (NoPE)."""
    window: int | None = None
    """Tokens that a query attends to, its own included (sliding-window attention); None: all tokens
    before it, too."""


def layers_by_type(
    layer_types: Sequence[str], window: int | None, *, rope_by_type: bool = False
) -> tuple[LayerShape, ...]:
    """Dense layers, in which "sliding_attention" has the window and all else sees everything.

    Args:
        rope_by_type: each type has its own entry in rope_parameters.

    Raises:
        ValueError: a layer slides, and sliding_window gives no window.
    """
    if window is None and "sliding_attention" in layer_types:
        raise ValueError("layer_types has 'sliding_attention', and sliding_window gives no window")
    return tuple(
        LayerShape(
            window=window if kind == "sliding_attention" else None,
            rope=kind if rope_by_type else "",
        )
        for kind in layer_types
    )


def uniform_layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    """config.json -> dense layers that are all alike."""
    return (LayerShape(),) * values["num_hidden_layers"]


class Part(NamedTuple):
    """What one Hugging Face tensor, or some of its rows, gives to a megatron-core parameter."""

    hf_name: str
    start: int
    """Its first row in the tensor."""
    shape: tuple[int, ...]


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
    part_rows: tuple[int, ...] = ()
    """Rows of the parts that its Hugging Face tensors hold one after the other, such as q, k and v
    in one; tensor parallelism cuts each of them. () if every tensor is one part."""
    dtype: str | None = None
    """Torch's name of a type that it always has; None: that of the whole model."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are fused, in their order."""
        if not self.part_rows:
            return tuple(
                Part(name, 0, shape)
                for name, shape in zip(self.hf_names, self.hf_shapes, strict=True)
            )
        return tuple(
            Part(name, start, (size, *rest))
            for name, (_, *rest), sizes in zip(
                self.hf_names, self.hf_shapes, self._rows_by_tensor, strict=True
            )
            for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False)
        )

    @property
    def _rows_by_tensor(self) -> list[tuple[int, ...]]:
        """`part_rows` of each tensor."""
        ends = list(accumulate(shape[0] for shape in self.hf_shapes))
        edges = [0, *accumulate(self.part_rows)]
        assert edges[-1] == ends[-1], self
        stops = [edges.index(end) for end in ends]
        starts = [0, *stops[:-1]]
        return [self.part_rows[first:last] for first, last in zip(starts, stops, strict=True)]

    def in_one_tensor(self, hf_name: str) -> WeightRow:
        """The same row of a checkpoint that holds all its tensors in one."""
        rows = tuple(shape[0] for shape in self.hf_shapes)
        return replace(
            self,
            hf_names=(hf_name,),
            hf_shapes=((sum(rows), *self.hf_shapes[0][1:]),),
            part_rows=rows,
        )

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Whole Hugging Face tensors -> whole parts."""
        if not self.part_rows:
            return list(tensors)
        pairs = zip(tensors, self._rows_by_tensor, strict=True)
        return [part for tensor, sizes in pairs for part in tensor.split(sizes)]

    def join(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Whole parts -> whole Hugging Face tensors."""
        import torch

        if not self.part_rows:
            return list(parts)
        remaining = iter(parts)
        numbers = map(len, self._rows_by_tensor)
        return [torch.cat(list(islice(remaining, number))) for number in numbers]

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
        """One rank's slices of the parts -> its megatron-core parameter."""
        import torch  # preflight reads names and shapes without it

        if not self.query_groups:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        groups = self.query_groups // tp_size
        return torch.cat(
            [part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1
        ).flatten(0, 1)

    def split(self, fused: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
        """One rank's megatron-core parameter -> its slices of the parts."""
        views = self.views(fused, tp_size)
        return [view.flatten(0, 1) for view in views] if self.query_groups else views

    def views(self, fused: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
        """`split` without a copy: q, k and v get a first axis of query groups."""
        parts = self.parts
        if len(parts) == 1:
            return [fused]
        rows = [part.shape[0] // tp_size for part in parts]
        if not self.query_groups:
            return list(fused.split(rows))
        groups = self.query_groups // tp_size
        by_group = fused.view(groups, -1, *fused.shape[1:])
        return list(by_group.split([r // groups for r in rows], dim=1))


def norm_row(hf_name: str, size: int, *names: str) -> WeightRow:
    """The row of a norm's weight, `hf_name` in Hugging Face's layers and `names` in ours."""
    weights = tuple(name if name.endswith("weight") else f"{name}.weight" for name in names)
    return WeightRow(weights, (f"{hf_name}.weight",), ((size,),))


def attention(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """Rows of a layer's attention with grouped queries."""
    hidden, head_dim, groups = shape.hidden_size, shape.head_dim, shape.num_kv_heads
    q, kv = shape.num_heads * head_dim, groups * head_dim
    q_rows = 2 * q if shape.family.has_output_gate else q
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    rows = [
        WeightRow(
            ("self_attention.linear_qkv.weight",),
            tuple(f"{name}.weight" for name in qkv),
            ((q_rows, hidden), (kv, hidden), (kv, hidden)),
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
    if shape.has_qkv_bias:
        rows.append(
            WeightRow(
                ("self_attention.linear_qkv.bias",),
                tuple(f"{name}.bias" for name in qkv),
                ((q_rows,), (kv,), (kv,)),
                tp_axis=0,
                query_groups=groups,
            )
        )
    if shape.has_qk_norm:
        sizes = (q, kv) if shape.family.qk_norm_of_all_heads else (head_dim, head_dim)
        rows += [
            norm_row(f"self_attn.{x}_norm", size, f"self_attention.{x}_layernorm")
            for x, size in zip("qk", sizes, strict=True)
        ]
    return rows


def gated_mlp(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """Rows of a layer's MLP: down(act(gate(x)) * up(x))."""
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
    has_classifier: bool = True
    """Whether transformers has a class of the same model with a score head."""
    own_classifier: str = ""
    """That class, where its name does not follow from `architecture`."""
    keys: tuple[str, ...] = ()
    """Further keys of config.json that rlsys implements."""
    inert: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key of config.json -> the values with which it changes nothing in this family."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers and vLLM take for keys that config.json leaves out."""
    heads_divide_hidden: bool = False
    """Whether transformers refuses another number of heads even if config.json has head_dim."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelShape with one value in all of its models, which config.json may not say."""
    qk_norm_of_all_heads: bool = False
    """Whether q and k are normalised over all heads together, and not by head."""
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
    """Kinds of rotary embeddings: `rlsys.model.rope`."""
    rope_keys: tuple[str, ...] = ()
    """Further keys of rope_parameters that rlsys implements."""
    rope_by_layer_type: bool = False
    """Whether layers of another type have another rotary embedding."""
    partial_rotary: bool = False
    """Whether the family may turn a part of each head only."""
    layer_types: tuple[str, ...] = ("full_attention",)
    """What layer_types of config.json may name."""
    has_output_gate: bool = False
    """Whether q_proj also gives a gate for each head, for the output of attention."""
    mtp_prefix: str | None = None
    """Start of the names of tensors that only predict further tokens."""
    norms: Norms = "pre"
    """Where a layer has norms: "pre" before attention and MLP, "post" after each, before its
    output is added to the residual, "sandwich" both."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + their weight, in float32."""
    scaled_embeddings: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size), rounded to the model's type."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """What the MLP applies to its gate."""
    layers: Callable[[Mapping[str, Any]], tuple[LayerShape, ...]] = uniform_layers
    """config.json with `defaults` -> its layers; raises ValueError and KeyError."""
    attention: Callable[[ModelShape, LayerShape], list[WeightRow]] = attention
    """Rows of a layer's attention, with names relative to the layer."""
    mlp: Callable[[ModelShape, LayerShape], list[WeightRow]] = gated_mlp
    """Rows of a layer's MLP, with names relative to the layer."""
    router_dtype: Literal["fp32"] | None = None
    """Type in which transformers computes the logits of routers; None: the model's."""
    shared_expert: str = "shared_experts"
    """Hugging Face's name of the expert that all tokens go through, where layers have one."""
    own_sizes: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda values: {}
    """config.json -> further fields of its ModelShape; raises ValueError and KeyError."""
    is_bridged: bool = False
    """Whether mcore-bridge has the weights: the rows then only count parameters."""

    @property
    def classifier(self) -> str:
        """transformers' class of the model with a score head."""
        assert self.has_classifier, "see key_problems"
        derived = self.architecture.replace("ForCausalLM", "ForSequenceClassification")
        return self.own_classifier or derived

    def layer(self, shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
        """Rows of one decoder layer, with names relative to the layer, in the model's order."""
        size, hf_names = shape.hidden_size, _HF_NORMS[self.norms]
        before = [
            ("input_layernorm", "self_attention.linear_qkv.layer_norm_weight"),
            ("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm_weight"),
        ]
        after = [("self_attn_bda.norm",), ("mlp_bda.norm",)]
        rows: list[WeightRow] = []
        for block, part in enumerate((self.attention, self.mlp)):
            hf_before, hf_after = hf_names[block]
            rows += [norm_row(hf_before, size, *before[block])] if hf_before else []
            rows += part(shape, layer)
            rows += [norm_row(hf_after, size, *after[block])] if hf_after else []
        return rows


def weight_table(shape: ModelShape) -> list[WeightRow]:
    """Every parameter of a model, in the order of the model."""
    embedding_shape = (shape.vocab_size, shape.hidden_size)
    kinds = {layer: shape.family.layer(shape, layer) for layer in set(shape.layers)}
    norm = (("decoder.final_layernorm.weight",), ("model.norm.weight",), ((shape.hidden_size,),))
    rows = [
        WeightRow((EMBEDDING,), (HF_EMBEDDING,), (embedding_shape,), tp_axis=0),
        *(
            row.in_layer(number)
            for number, layer in enumerate(shape.layers)
            for row in kinds[layer]
        ),
        WeightRow(*norm),
    ]
    if shape.num_labels is not None:
        rows.append(WeightRow((SCORE,), (SCORE,), ((shape.num_labels, shape.hidden_size),)))
    elif not shape.tied:
        rows.append(WeightRow((OUTPUT,), (HF_OUTPUT,), (embedding_shape,), tp_axis=0))
    return rows
