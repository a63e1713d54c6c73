"""Hugging Face weights in and out of megatron-core: one table, used in both directions.

megatron-core fuses what Hugging Face keeps apart (q, k, v into `linear_qkv`, interleaved by query
group; gate and up into `linear_fc1`) and cuts it over tensor- and pipeline-parallel ranks. The
table has one row for each megatron parameter of the whole model; loading reads just this rank's
slices, exporting streams whole Hugging Face tensors, one parameter at a time. Both are copies, so
a round trip is bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from rlsys.engines.hf_checkpoint import SafetensorsReader
from rlsys.model_shape import ModelShape
from rlsys.weight_sync.plan import TensorMeta

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class WeightRow:
    """One megatron parameter and the Hugging Face tensors it is made of."""

    names: tuple[str, ...]
    """Its name with the global layer number; the second one is Transformer Engine's, where it
    differs."""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    tp_axis: int | None
    """The axis that tensor parallelism cuts, of the Hugging Face tensors; None: replicated."""
    query_groups: int = 0
    """For linear_qkv: query groups of the whole model, by which q, k and v are interleaved."""

    def fuse(self, parts: list[torch.Tensor], tp_size: int) -> torch.Tensor:
        """One rank's slices of the Hugging Face tensors -> its megatron parameter."""
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
    """Every parameter of a dense Llama, Qwen2 or Qwen3, in the order of the model."""
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
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    groups, head_dim = shape.num_kv_heads, shape.head_dim
    q_rows, kv_rows = shape.num_heads * head_dim, groups * head_dim

    def row(
        names: list[str],
        hf_names: list[str],
        hf_shapes: list[tuple[int, ...]],
        tp_axis: int | None,
        query_groups: int = 0,
    ) -> WeightRow:
        return WeightRow(
            tuple(f"decoder.layers.{layer}.{name}" for name in names),
            tuple(f"model.layers.{layer}.{name}" for name in hf_names),
            tuple(hf_shapes),
            tp_axis,
            query_groups,
        )

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
        row(
            ["mlp.linear_fc1.weight"],
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            [(ffn, hidden), (ffn, hidden)],
            0,
        ),
        row(["mlp.linear_fc2.weight"], ["mlp.down_proj.weight"], [(hidden, ffn)], 1),
    ]


class MegatronWeights:
    """The weights of one rank's part of a model, by the table.

    Args:
        model: the bare GPTModel of this rank.
        shape: of the whole model.
        tp_group, pp_group: this rank's parallel groups.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        shape: ModelShape,
        *,
        tp_group: dist.ProcessGroup,
        pp_group: dist.ProcessGroup,
    ):
        self.table = weight_table(shape)
        self.tied = shape.tied
        self._tp, self._pp = tp_group, pp_group
        self._parameters = _named_globally(model)
        self._dtype = next(model.parameters()).dtype
        self._owners = self._pipeline_owners()
        self._mark_tensor_parallel()

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and shape of every Hugging Face tensor, in the order of `export`."""
        dtype = str(self._dtype).removeprefix("torch.")
        return [
            TensorMeta(name, dtype, shape)
            for row in self.table
            for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)
        ]

    @torch.no_grad()
    def load(self, reader: SafetensorsReader) -> None:
        """Read this rank's slices; raises ValueError where names or shapes do not fit."""
        rank, size = self._tp.rank(), self._tp.size()
        loaded = set()
        for row in self.table:
            name = self._own_name(row)
            if name is not None:
                parts = [reader.shard(hf, row.tp_axis, rank, size) for hf in row.hf_names]
                self._copy(row.fuse(parts, size), name)
                loaded.add(name)
        if self.tied and OUTPUT in self._parameters:  # the last stage's copy of tied embeddings
            self._copy(reader.shard(HF_EMBEDDING, 0, rank, size), OUTPUT)
            loaded.add(OUTPUT)
        missing = self._parameters.keys() - loaded
        assert not missing, f"no Hugging Face tensor for {sorted(missing)}"

    @torch.no_grad()
    def mix(self, tensors: Iterator[tuple[str, torch.Tensor]], *, alpha: float) -> None:
        """Move every parameter to `alpha` times another model's + (1 - alpha) times its own.

        Args:
            tensors: what that model's `export` gives, whole and in its order.
            alpha: 1 is a copy.
        """
        rank, size = self._tp.rank(), self._tp.size()
        for row in self.table:
            parts = []
            for hf_name in row.hf_names:
                name, tensor = next(tensors)
                assert name == hf_name, (name, hf_name)
                if row.tp_axis is not None:
                    tensor = tensor.chunk(size, dim=row.tp_axis)[rank]
                parts.append(tensor)
            own_name = self._own_name(row)
            assert own_name is not None, "only for models of one pipeline stage"
            parameter = self._parameters[own_name]
            other = row.fuse(parts, size).to(parameter)
            if alpha == 1.0:
                parameter.copy_(other)
            else:
                parameter.lerp_(other, alpha)

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole Hugging Face tensors, in order: on pipeline rank 0, and every rank must iterate.

        Other pipeline ranks take part in the collectives and yield the same tensors.
        """
        for row, owner in zip(self.table, self._owners, strict=True):
            name = self._own_name(row)
            if self._pp.rank() == owner:
                assert name is not None
                tensors = self._gather(row, self._parameters[name].detach())
            else:
                tensors = [
                    torch.empty(shape, dtype=self._dtype, device=self.device)
                    for shape in row.hf_shapes
                ]
            if self._pp.size() > 1:
                source = dist.get_global_rank(self._pp, owner)
                for tensor in tensors:
                    dist.broadcast(tensor, source, group=self._pp)
            yield from zip(row.hf_names, tensors, strict=True)

    def own_parameter(self, row: WeightRow) -> torch.nn.Parameter | None:
        """This rank's parameter of a row of the table, if it has one."""
        name = self._own_name(row)
        return None if name is None else self._parameters[name]

    def slice_of(self, row: WeightRow) -> tuple[int, int]:
        """Which slice of a row's tensors this rank would have, and of how many."""
        return (0, 1) if row.tp_axis is None else (self._tp.rank(), self._tp.size())

    def own_slices(self, row: WeightRow) -> list[torch.Tensor]:
        """This rank's slices of a row's tensors, as views of its parameter: see WeightRow.views."""
        parameter = self.own_parameter(row)
        assert parameter is not None, row.names
        _, number = self.slice_of(row)
        return row.views(parameter.detach(), number)

    def _mark_tensor_parallel(self) -> None:
        """Say which parameters are cut over ranks, which megatron-core does as it initialises them.

        We skip that initialisation, as every weight is loaded; an unmarked parameter is taken for
        a replica and counted on one rank only, so that gradients would be clipped to a wrong norm.
        """
        for row in self.table:
            name = self._own_name(row)
            if name is not None and row.tp_axis is not None:
                _mark(self._parameters[name], row.tp_axis)
        if OUTPUT in self._parameters:
            _mark(self._parameters[OUTPUT], 0)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self._parameters.values())).device

    def _own_name(self, row: WeightRow) -> str | None:
        return next((name for name in row.names if name in self._parameters), None)

    def _copy(self, value: torch.Tensor, name: str) -> None:
        parameter = self._parameters[name]
        if parameter.shape != value.shape:
            raise ValueError(
                f"the checkpoint gives {name} shape {tuple(value.shape)}, its config.json "
                f"{tuple(parameter.shape)}: weights and config are of different models"
            )
        parameter.copy_(value)

    def _gather(self, row: WeightRow, fused: torch.Tensor) -> list[torch.Tensor]:
        if row.tp_axis is None or self._tp.size() == 1:
            return [part.contiguous() for part in row.split(fused, 1)]
        shards = [torch.empty_like(fused) for _ in range(self._tp.size())]
        dist.all_gather(shards, fused.contiguous(), group=self._tp)
        by_rank = [row.split(shard, self._tp.size()) for shard in shards]
        return [torch.cat(parts, dim=row.tp_axis) for parts in zip(*by_rank, strict=True)]

    def _pipeline_owners(self) -> list[int]:
        """For each row of the table, the first pipeline rank that has it."""
        owned = [self._own_name(row) is not None for row in self.table]
        by_rank: list[list[bool]] = [owned] * self._pp.size()
        if self._pp.size() > 1:
            dist.all_gather_object(by_rank, owned, group=self._pp)
        return [column.index(True) for column in zip(*by_rank, strict=True)]


def _mark(parameter: torch.nn.Parameter, axis: int) -> None:
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=axis, stride=1)


def _named_globally(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, with layers numbered over the whole model instead of this stage."""
    first_layer = model.decoder.layers[0].layer_number - 1
    parameters = {}
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{int(local) + first_layer}.{rest}"
        parameters[name] = parameter
    return parameters
