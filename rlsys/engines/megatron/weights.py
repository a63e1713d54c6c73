"""Hugging Face weights in and out of megatron-core, by one table for both directions.

megatron-core cuts its parameters over tensor-parallel, pipeline-parallel and expert-parallel ranks.
Loading reads only this rank's slices. Exporting streams whole Hugging Face tensors, one parameter
at a time, or one parameter of all experts of a layer. A round trip is bit-equal.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from rlsys.engines.megatron.hf_folder import SafetensorsReader
from rlsys.model.families.base import EMBEDDING, HF_EMBEDDING, OUTPUT, WeightRow, weight_table
from rlsys.model.shape import ModelShape
from rlsys.weight_sync.plan import DTYPES, TensorMeta, shard_bounds


class MegatronWeights:
    """The weights of one rank's part of a model.

    Args:
        chunks: the bare GPTModels of this rank.
        shape: sizes of the whole model.
        table: the rows that count, with Hugging Face's names or PEFT's; None: the whole model's.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        shape: ModelShape,
        table: list[WeightRow] | None = None,
    ):
        self.table = weight_table(shape) if table is None else table
        self.tied = shape.tied and table is None
        self._vocab_size = shape.vocab_size
        self._tp = parallel_state.get_tensor_model_parallel_group()
        self._pp = parallel_state.get_pipeline_model_parallel_group()
        self._ep = parallel_state.get_expert_model_parallel_group()
        own_experts = shape.experts.number // self._ep.size() if shape.is_moe else 0
        named = _named_globally(chunks, first_expert=self._ep.rank() * own_experts)
        self._dtype = next(iter(named.values())).dtype
        self.device = next(iter(named.values())).device
        """Where the parameters are."""
        if table is not None:
            rows = {name for row in table for name in row.names}
            named = {name: parameter for name, parameter in named.items() if name in rows}
        self._parameters = named
        self._chunks = chunks
        self.sharding = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "non_homogeneous_layers": len(set(shape.layers)) > 1,
        }
        """How dist_checkpointing names tensors: layers that are alike share one tensor."""
        self._owners = self._pipeline_owners()
        self._mark_tensor_parallel()

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and shape of every Hugging Face tensor, in the order of `export`."""
        dtype = str(self._dtype).removeprefix("torch.")
        return [
            TensorMeta(name, row.dtype or dtype, shape)
            for row in self.table
            for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)
        ]

    @torch.no_grad()
    def load(self, folder: Path, *, may_lack: Collection[str] = ()) -> None:
        """Read this rank's slices of a model folder.

        Args:
            folder: of a model, or of an adapter if the table is one's.
            may_lack: Hugging Face's names of tensors that stay as they are where it lacks them.

        Raises:
            ValueError: a tensor is missing, or has another shape than the model's.
        """
        rank, size = self._tp.rank(), self._tp.size()
        loaded = set()
        with SafetensorsReader(folder) as reader:
            lacking = {*may_lack} - {*reader.names}
            for row in self.table:
                name = self._own_name(row)
                if name is None:
                    continue
                if not lacking.isdisjoint(row.hf_names):
                    loaded.add(name)
                else:
                    parts = [reader.part(part, row.tp_axis, rank, size) for part in row.parts]
                    self._copy(row.fuse(parts, size), name)
                    loaded.add(name)
            if self.tied and OUTPUT in self._parameters:  # the last stage's copy of tied embeddings
                self._copy(reader.shard(HF_EMBEDDING, 0, rank, size), OUTPUT)
                loaded.add(OUTPUT)
        missing = self._parameters.keys() - loaded
        assert not missing, f"no Hugging Face tensor for {sorted(missing)}"

    @torch.no_grad()
    def mix(self, tensors: Iterator[tuple[str, torch.Tensor]], *, alpha: float) -> None:
        """Set every parameter p to `alpha` times that of another model + (1 - alpha) p.

        Args:
            tensors: from that model's `export`, in its order.
            alpha: 1 is a copy.
        """
        rank, size = self._tp.rank(), self._tp.size()
        for row in self.table:
            names, whole = zip(*islice(tensors, len(row.hf_names)), strict=True)
            assert names == row.hf_names, (names, row.hf_names)
            parts = row.cut(whole)
            if (axis := row.tp_axis) is not None:
                parts = [part.chunk(size, dim=axis)[rank] for part in parts]
            own_name = self._own_name(row)
            if own_name is None:
                assert row.experts, "only for models of one pipeline stage"
                continue
            parameter = self._without_padding(own_name)
            other = row.fuse(parts, size).to(parameter)
            if alpha == 1.0:
                parameter.copy_(other)
            else:
                parameter.lerp_(other, alpha)

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole Hugging Face tensors, in order, on every rank; all ranks must iterate."""
        for _, group in groupby(zip(self.table, self._owners, strict=True), _is_gathered_with):
            rows, owners = zip(*group, strict=True)
            gather = self._gather_experts if rows[0].experts else self._gather
            tensors = gather(rows, owners[0])
            yield from zip([name for row in rows for name in row.hf_names], tensors, strict=True)

    def sharded_state(self) -> dict[str, Any]:
        """This rank's parameters with their places in the whole model, for dist_checkpointing."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = self.sharding | {"dp_cp_group": group}
        states = [chunk.sharded_state_dict(metadata=metadata) for chunk in self._chunks]
        # megatron-core's own names of several chunks, each of which numbers its layers from 0.
        return states[0] if len(states) == 1 else {f"model{i}": s for i, s in enumerate(states)}

    def own_parameter(self, row: WeightRow) -> torch.Tensor | None:
        """This rank's parameter of a row of the table, or None."""
        name = self._own_name(row)
        return None if name is None else self._parameters[name]

    def parameters_named(self, *names: str) -> list[torch.Tensor]:
        """This rank's parameters with these names."""
        return [self._parameters[name] for name in names if name in self._parameters]

    def computes(self, row: WeightRow) -> bool:
        """Whether `own_parameter` computes a row's parameter when it is read."""
        return False

    def slice_of(self, row: WeightRow) -> tuple[int, int]:
        """(index, num_shards) of this rank's slice of a row's parts, if it has the row."""
        return (0, 1) if row.tp_axis is None else (self._tp.rank(), self._tp.size())

    def own_slices(self, row: WeightRow) -> list[torch.Tensor]:
        """This rank's slices of a row's parts, as views of its parameter: see WeightRow.views."""
        parameter = self.own_parameter(row)
        assert parameter is not None, row.names
        _, num_shards = self.slice_of(row)
        return row.views(parameter.detach(), num_shards)

    def _mark_tensor_parallel(self) -> None:
        """Mark the parameters that are cut over ranks, which megatron-core's initialisation does.

        It is skipped, because every weight is loaded. An unmarked parameter counts as a replica, on
        one rank only, so gradients would be clipped to a wrong norm. An expert has one owner among
        tensor-parallel ranks, so it is not a replica either.
        """
        for row in self.table:
            name = self._own_name(row)
            if name is not None and (row.tp_axis is not None or row.experts):
                _mark(self._parameters[name], row.tp_axis or 0)
        if OUTPUT in self._parameters:
            _mark(self._parameters[OUTPUT], 0)

    @property
    def has_fp8(self) -> bool:
        """Whether parameters are FP8, so that what they stand for is not what memory holds."""
        return any(map(is_float8tensor, self._parameters.values()))

    def _own_name(self, row: WeightRow) -> str | None:
        return next((name for name in row.names if name in self._parameters), None)

    def _copy(self, value: torch.Tensor, name: str) -> None:
        if name in (EMBEDDING, OUTPUT):
            self._parameters[name].zero_()  # rows that fill the vocabulary up stay 0
        parameter = self._without_padding(name)
        if parameter.shape != value.shape:
            raise ValueError(
                f"the checkpoint gives {name} shape {tuple(value.shape)}, its config.json "
                f"{tuple(parameter.shape)}: they are of different models, or of adapters of "
                "different ranks"
            )
        parameter.copy_(value)
        if hasattr(parameter, "_high_precision_init_val"):
            # What the optimizer's copy of an FP8 parameter begins with.
            parameter._high_precision_init_val.copy_(value)

    def _without_padding(self, name: str) -> torch.Tensor:
        """A parameter without the rows that fill the vocabulary up to a multiple of ranks.

        These rows embed no token and cannot be sampled, so their gradient is 0.
        """
        parameter = self._parameters[name]
        if name not in (EMBEDDING, OUTPUT):
            return parameter
        start, stop = shard_bounds(self._vocab_size, self._tp.rank(), self._tp.size())
        return parameter[: stop - start]

    def _gather(self, rows: Sequence[WeightRow], owner: int) -> list[torch.Tensor]:
        """The whole tensors of one row, which pipeline rank `owner` has."""
        (row,) = rows
        if self._pp.rank() == owner:
            tensors = self._gather_slices(row)
        else:
            dtype = self._dtype if row.dtype is None else DTYPES[row.dtype]
            tensors = [
                torch.empty(shape, dtype=dtype, device=self.device) for shape in row.hf_shapes
            ]
        for tensor in tensors:
            self._broadcast(tensor, owner)
        return tensors

    def _gather_slices(self, row: WeightRow) -> list[torch.Tensor]:
        parameter = self.own_parameter(row)
        assert parameter is not None, row.names
        fused = _dequantised(parameter)
        if row.tp_axis is None or self._tp.size() == 1:
            return [tensor.contiguous() for tensor in row.join(row.split(fused, 1))]
        shards = [torch.empty_like(fused) for _ in range(self._tp.size())]
        dist.all_gather(shards, fused.contiguous(), group=self._tp)
        by_rank = [row.split(shard, self._tp.size()) for shard in shards]
        return row.join(
            [
                torch.cat(slices, dim=row.tp_axis).narrow(row.tp_axis, 0, part.shape[row.tp_axis])
                for slices, part in zip(zip(*by_rank, strict=True), row.parts, strict=True)
            ]
        )

    def _gather_experts(self, rows: Sequence[WeightRow], owner: int) -> list[torch.Tensor]:
        """The tensors of all experts of a layer, in one collective of each kind."""
        own = [_dequantised(p) for row in rows if (p := self.own_parameter(row)) is not None]
        if self._ep.size() == self._pp.size() == 1:
            experts: Sequence[torch.Tensor] = own
        else:
            shape = (len(rows), sum(part[0] for part in rows[0].hf_shapes), rows[0].hf_shapes[0][1])
            stacked = torch.empty(shape, dtype=self._dtype, device=self.device)
            if self._pp.rank() == owner:
                dist.all_gather_into_tensor(stacked, torch.stack(own), group=self._ep)
            self._broadcast(stacked, owner)
            experts = stacked.unbind()
        return [
            part for row, fused in zip(rows, experts, strict=True) for part in row.split(fused, 1)
        ]

    def _broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        if self._pp.size() > 1:
            dist.broadcast(tensor, dist.get_global_rank(self._pp, owner), group=self._pp)

    def _pipeline_owners(self) -> list[int]:
        """For each row of the table, the first pipeline rank with it, or with experts like it."""
        layers = {row.experts for row in self.table if self._own_name(row) is not None}
        owned = [
            row.experts in layers if row.experts else self._own_name(row) is not None
            for row in self.table
        ]
        by_rank: list[list[bool]] = [owned] * self._pp.size()
        if self._pp.size() > 1:
            dist.all_gather_object(by_rank, owned, group=self._pp)
        return [column.index(True) for column in zip(*by_rank, strict=True)]


def _is_gathered_with(row_and_owner: tuple[WeightRow, int]) -> tuple[str, ...]:
    row, _ = row_and_owner
    return (row.experts,) if row.experts else row.names


def _dequantised(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter; of one in FP8, what it stands for in the model's type."""
    value = parameter.detach()
    return value.dequantize() if is_float8tensor(value) else value


def _mark(parameter: torch.Tensor, axis: int) -> None:
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=axis, stride=1)


_LOCAL_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+")
"""The number of an expert in names of SequentialMLP and of Transformer Engine's TEGroupedMLP."""


def _named_globally(
    chunks: Sequence[torch.nn.Module], *, first_expert: int
) -> dict[str, torch.Tensor]:
    """Parameters by name, with layers and experts numbered over the whole model.

    The biases by which routers choose experts count, too: they are a part of checkpoints, and
    buffers, since no gradient trains them.
    """
    parameters = {}
    for chunk in chunks:
        biases = [(name, b) for name, b in chunk.named_buffers() if name.endswith(".expert_bias")]
        for name, parameter in [*chunk.named_parameters(), *biases]:
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                layer = chunk.decoder.layers[int(local)].layer_number - 1
                name = f"decoder.layers.{layer}.{rest}"
                name = _LOCAL_EXPERT.sub(lambda number: str(int(number[0]) + first_expert), name)
            parameters[name] = parameter
    return parameters
