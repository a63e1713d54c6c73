"""Which Hugging Face tensors each megatron-core parameter is made of: the table.

megatron-core fuses what Hugging Face keeps apart (q, k, v into `linear_qkv`, interleaved by query
group; gate and up into `linear_fc1`). The table has one row for each megatron parameter of the
whole model, an expert's included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsys.model.shape import ModelShape

if TYPE_CHECKING:
    import torch

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class WeightRow:
    """One megatron parameter and the Hugging Face tensors it is made of."""

    names: tuple[str, ...]
    """Its name, with layer and expert numbered over the whole model; the second one is
    Transformer Engine's, where it differs."""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    tp_axis: int | None
    """The axis that tensor parallelism cuts, of the Hugging Face tensors; None: replicated."""
    query_groups: int = 0
    """For linear_qkv: query groups of the whole model, by which q, k and v are interleaved."""
    experts: str | None = None
    """For an expert's parameter: what those of its layer have in common, which follow each other
    in the table. Each rank of the expert group has as many of them, in its order."""

    def fuse(self, parts: list[torch.Tensor], tp_size: int) -> torch.Tensor:
        """One rank's slices of the Hugging Face tensors -> its megatron parameter."""
        import torch  # not for those who only look at names and shapes

        if not self.query_groups:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        groups = self.query_groups // tp_size
        return torch.cat(
            [part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1
        ).flatten(0, 1)

    def split(self, fused: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
        """One rank's megatron parameter -> its slices of the Hugging Face tensors."""
        views = self.views(fused, tp_size)
        return [view.flatten(0, 1) for view in views] if self.query_groups else views

    def views(self, fused: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
        """`split` without a copy: q, k and v have their query groups as an axis before the rest."""
        if len(self.hf_names) == 1:
            return [fused]
        rows = [shape[0] // tp_size for shape in self.hf_shapes]
        if not self.query_groups:
            return list(fused.split(rows))
        groups = self.query_groups // tp_size
        by_group = fused.view(groups, -1, *fused.shape[1:])
        return list(by_group.split([r // groups for r in rows], dim=1))


def weight_table(shape: ModelShape) -> list[WeightRow]:
    """Every parameter of a Llama, Qwen2, Qwen3 or Qwen3-MoE, in the order of the model."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    rows = [WeightRow((EMBEDDING,), (HF_EMBEDDING,), ((vocab, hidden),), 0)]
    for layer in range(shape.num_layers):
        rows += _layer_rows(shape, layer)
    rows.append(
        WeightRow(("decoder.final_layernorm.weight",), ("model.norm.weight",), ((hidden,),), None)
    )
    if not shape.tied:
        rows.append(WeightRow((OUTPUT,), (HF_OUTPUT,), ((vocab, hidden),), 0))
    return rows


def _layer_rows(shape: ModelShape, layer: int) -> list[WeightRow]:
    hidden = shape.hidden_size
    groups, head_dim = shape.num_kv_heads, shape.head_dim
    q_rows, kv_rows = shape.num_heads * head_dim, groups * head_dim

    def row(names: list[str], hf_names: list[str], *columns: Any) -> WeightRow:
        return _layer_row(layer, names, hf_names, *columns)

    def norm(names: list[str], hf_name: str, size: int = hidden) -> WeightRow:
        return row(names, [hf_name], [(size,)], None)

    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    attention = [
        row(
            ["self_attention.linear_qkv.weight"],
            [f"{name}.weight" for name in qkv],
            [(q_rows, hidden), (kv_rows, hidden), (kv_rows, hidden)],
            0,
            groups,
        ),
        row(
            ["self_attention.linear_proj.weight"],
            ["self_attn.o_proj.weight"],
            [(hidden, q_rows)],
            1,
        ),
    ]
    if shape.has_qkv_bias:
        attention.append(
            row(
                ["self_attention.linear_qkv.bias"],
                [f"{name}.bias" for name in qkv],
                [(q_rows,), (kv_rows,), (kv_rows,)],
                0,
                groups,
            )
        )
    if shape.has_qk_norm:
        attention += [
            norm([f"self_attention.{x}_layernorm.weight"], f"self_attn.{x}_norm.weight", head_dim)
            for x in "qk"
        ]
    return [
        norm(
            ["input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"],
            "input_layernorm.weight",
        ),
        *attention,
        norm(
            ["pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"],
            "post_attention_layernorm.weight",
        ),
        *(_expert_rows(shape, layer) if shape.is_moe else _mlp_rows(shape, layer)),
    ]


def _mlp_rows(shape: ModelShape, layer: int) -> list[WeightRow]:
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    return [
        _layer_row(
            layer,
            ["mlp.linear_fc1.weight"],
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            [(ffn, hidden), (ffn, hidden)],
            0,
        ),
        _layer_row(layer, ["mlp.linear_fc2.weight"], ["mlp.down_proj.weight"], [(hidden, ffn)], 1),
    ]


def _expert_rows(shape: ModelShape, layer: int) -> list[WeightRow]:
    """The router and every expert: first all of their linear_fc1, then all of their linear_fc2."""
    hidden, ffn = shape.hidden_size, shape.moe_intermediate_size
    router = [(shape.num_experts, hidden)]
    rows = [_layer_row(layer, ["mlp.router.weight"], ["mlp.gate.weight"], router, None)]
    linears: dict[str, tuple[list[str], tuple[int, int]]] = {
        "linear_fc1": (["gate_proj", "up_proj"], (ffn, hidden)),
        "linear_fc2": (["down_proj"], (hidden, ffn)),
    }
    for linear, (hf_linears, hf_shape) in linears.items():
        rows += [
            _layer_row(
                layer,
                [
                    f"mlp.experts.local_experts.{expert}.{linear}.weight",
                    f"mlp.experts.{linear}.weight{expert}",
                ],
                [f"mlp.experts.{expert}.{hf_linear}.weight" for hf_linear in hf_linears],
                [hf_shape] * len(hf_linears),
                None,
                experts=f"decoder.layers.{layer}.mlp.experts.{linear}",
            )
            for expert in range(shape.num_experts)
        ]
    return rows


def _layer_row(
    layer: int,
    names: list[str],
    hf_names: list[str],
    hf_shapes: list[tuple[int, ...]],
    tp_axis: int | None,
    query_groups: int = 0,
    experts: str | None = None,
) -> WeightRow:
    return WeightRow(
        tuple(f"decoder.layers.{layer}.{name}" for name in names),
        tuple(f"model.layers.{layer}.{name}" for name in hf_names),
        tuple(hf_shapes),
        tp_axis,
        query_groups,
        experts,
    )
