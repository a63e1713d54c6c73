"""Low-rank adapters on megatron-core's linear layers: see `rlsys.model.lora` for the mathematics.

For whoever sends or merges them, a policy with policy.lora has `engine.adapters`, an `Adapters`:

- `adapters.weights` is a MegatronWeights over PEFT's tensors: `metadata()`, `export()`, `load()`,
  and `BucketExport` takes it. Its names are those of adapter_model.safetensors, and hold the
  tensors of modules_to_save, too. `adapters.plan` has rank, alpha, scale and targets.
- `adapters.merged` is a MegatronWeights over the model's tensors, of which those with an adapter
  are W + scale B A: computed in float32 when they are read, and rounded once. `metadata()` and
  `export()` are as those of `engine.weights`, and `BucketExport` takes it: it asks `computes`
  which rows have no fixed memory to copy from. No weight of the model is changed.
- `with adapters.off():` lets the model compute as the base does, modules_to_save included.
- `engine.weights` is the base, but for modules_to_save, which have the trained values.

All but `off` and `plan` are collective: every rank calls.

Tensor parallelism cuts B of a layer whose output is cut, and A of one whose input is. The other
matrix is whole on each rank, and sequence parallelism gives each rank other tokens for it: its
gradient is summed over ranks by megatron-core, as that of a norm is (`sequence_parallel`). Between
A and B only `rank` numbers for each token are communicated.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from rlsys.engines.megatron.background import Write, in_host_memory
from rlsys.engines.megatron.hf_folder import SafetensorsReader, write_adapter_files
from rlsys.engines.megatron.weights import MegatronWeights
from rlsys.model.families.base import HF_EMBEDDING, HF_OUTPUT, WeightRow
from rlsys.model.lora import PARAMETERS, PEFT, LoraPlan, adapter_table, parameter_name
from rlsys.model.shape import ModelShape


class Adapters:
    """The adapters of one rank's part of a model, whose other parameters are frozen.

    Args:
        chunks: the bare GPTModels of this rank, before their DDP wrappers are made.
        weights: theirs, loaded.
        shape: sizes of the whole model.
        plan: which tensors have an adapter.
        seed: of new adapters, which do not depend on the parallel layout.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        weights: MegatronWeights,
        shape: ModelShape,
        plan: LoraPlan,
        *,
        seed: int,
    ):
        self.plan = plan
        self.is_on = True
        table = adapter_table(shape, plan)
        rows = {name: row for row in table for name in row.names}
        for chunk in chunks:
            chunk.requires_grad_(False)
        targets = {f"{target}.weight" for target in plan.targets}
        base_rows = {
            id(parameter): (row, parameter)
            for row in weights.table
            if (parameter := weights.own_parameter(row)) is not None and targets & {*row.hf_names}
        }
        self.by_weight: dict[str, LinearAdapter] = {}
        """The adapters of each of the model's parameters on this rank, by its first name."""
        for chunk in chunks:
            tree = _Tree(rows)
            for module in list(chunk.modules()):
                own = (base_rows.get(id(weight)) for weight in module.parameters(recurse=False))
                linears = [
                    LinearAdapter(row, plan, rows, weight, tree, seed)
                    for row, weight in filter(None, own)
                ]
                self.by_weight |= {linear.row.names[0]: linear for linear in linears}
                if linears:
                    module.register_forward_hook(partial(self._add, linears))
                    if hasattr(module, "layer_norm_weight"):
                        # Transformer Engine computes some norms with the linear layer behind them.
                        module.return_layernorm_output = True
            chunk.adapters = tree
        self.weights = MegatronWeights(chunks, shape, table)
        for row in table:
            parameter = self.weights.own_parameter(row)
            if parameter is not None:
                parameter.requires_grad_()
        self._saved = [
            parameter
            for row in table
            if not row.names[0].startswith(PARAMETERS)
            and (parameter := self.weights.own_parameter(row)) is not None
        ]
        self.base_of_saved = [parameter.detach().clone() for parameter in self._saved]
        if plan.folder is not None:
            _check_tied(plan, shape)
            self.weights.load(plan.folder)
        self.merged = _MergedWeights(weights, self)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute as the base model does; no optimizer step may be taken meanwhile."""
        trained = [parameter.detach().clone() for parameter in self._saved]
        self._set_saved(self.base_of_saved)
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True
            self._set_saved(trained)

    @torch.no_grad()
    def _set_saved(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._saved, values, strict=True):
            parameter.copy_(value)

    def _add(
        self, linears: list[LinearAdapter], module: torch.nn.Module, inputs: tuple, outputs: tuple
    ) -> tuple:
        """Forward hook of a linear layer, or of the linear layers of a rank's experts."""
        (output, bias), x = outputs, inputs[0]
        if isinstance(output, tuple):  # with the normed input
            output, x = output
        if not self.is_on:
            return output, bias
        if len(inputs) == 1:
            return linears[0].add(x, output, training=module.training), bias
        sizes = _numbers(inputs[1])  # the tokens of each expert follow each other
        by_expert = zip(linears, x.split(sizes), output.split(sizes), strict=True)
        added = [linear.add(x, y, training=module.training) for linear, x, y in by_expert]
        return torch.cat(added), bias

    def seed_dropout(self, *parts: int) -> None:
        """Seed the masks of an optimizer step by numbers that say which one it is.

        Each rank has its own tokens or its own inputs of a layer, so each has masks of its own.
        """
        if self.plan.dropout > 0:
            ranks = (
                parallel_state.get_data_parallel_rank(with_context_parallel=True),
                parallel_state.get_pipeline_model_parallel_rank(),
            )
            # Adds the tensor-parallel rank itself.
            model_parallel_cuda_manual_seed(hash((*parts, *ranks)) % 2**31, force_reset_rng=True)

    def stage_files(self, folder: Path, base_model: str) -> Write:
        """A function that writes PEFT's files into an existing folder, of the adapter as it is now.

        Every rank calls; on the others than the first one it writes nothing.
        """
        tensors = {name: in_host_memory(tensor) for name, tensor in self.weights.export()}
        if dist.get_rank() != 0:
            return lambda: None
        return partial(write_adapter_files, folder, tensors, self.plan, base_model)


class LinearAdapter:
    """The adapters of the tensors of one linear layer, or of one expert's.

    Args:
        row: of the layer's weight.
        rows: of the adapters' tables, by parameter.
        weight: the layer's.
        tree: gets the parameters.
    """

    def __init__(
        self,
        row: WeightRow,
        plan: LoraPlan,
        rows: dict[str, WeightRow],
        weight: torch.Tensor,
        tree: _Tree,
        seed: int,
    ):
        self.row = row
        self._scale, self._dropout = plan.scale, plan.dropout
        group = parallel_state.get_tensor_model_parallel_group()
        self._ranks = 1 if row.experts else group.size()
        self._cut = self._ranks if row.tp_axis == 0 else 1
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter] | None] = []
        """A and B of each of the row's tensors; None without an adapter."""
        for name in row.hf_names:
            module = name.removesuffix(".weight")
            if module not in plan.targets:
                self.pairs.append(None)
                continue
            names = [parameter_name(module, matrix) for matrix in ("lora_A", "lora_B")]
            values = (
                _initial_a(rows[names[0]], plan, seed),
                torch.zeros(rows[names[1]].hf_shapes[0]),
            )
            a, b = (
                _parameter(rows[n], value, weight, group if self._ranks > 1 else None)
                for n, value in zip(names, values, strict=True)
            )
            tree.place(names[0], a)
            tree.place(names[1], b)
            self.pairs.append((a, b))
        self._rows_of = [
            [
                part.shape[0] // (self._ranks if row.tp_axis == 0 else 1)
                for part in row.parts
                if part.hf_name == name
            ]
            for name in row.hf_names
        ]

    def add(self, x: torch.Tensor, output: torch.Tensor, *, training: bool) -> torch.Tensor:
        """`output` [..., out] of the layer on this rank for inputs `x` [..., in], adapted.

        B of all tensors is one matrix: each further product would go over the output once more.
        """
        pairs = [pair for pair in self.pairs if pair is not None]
        if training and self._dropout > 0:
            inner = torch.cat([F.linear(self._drop(x), a) for a, _ in pairs], dim=-1)
        else:
            a = torch.cat([a for a, _ in pairs]) if len(pairs) > 1 else pairs[0][0]
            inner = F.linear(x, a)
        if self._ranks > 1 and self.row.tp_axis == 0:
            inner = gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True)
        elif self._ranks > 1 and self.row.tp_axis == 1:
            inner = reduce_scatter_to_sequence_parallel_region(inner)
        adapted = torch.addmm(
            output.flatten(0, -2), inner.flatten(0, -2), self._fused_b().t(), alpha=self._scale
        )
        return adapted.view_as(output)

    def _fused_b(self) -> torch.Tensor:
        """[out, ranks of all adapters] B, its rows as in the layer's weight.

        Each tensor's B is in the columns of its own A, and 0 elsewhere.
        """
        width = sum(len(pair[0]) for pair in self.pairs if pair is not None)
        parts: list[torch.Tensor] = []
        start = 0
        for pair, rows in zip(self.pairs, self._rows_of, strict=True):
            if pair is None:
                some = next(pair for pair in self.pairs if pair is not None)[1]
                parts += [some.new_zeros(size, width) for size in rows]
                continue
            a, b = pair
            parts += F.pad(b, (start, width - start - len(a))).split(rows)
            start += len(a)
        return self.row.fuse(parts, self._cut)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            return F.dropout(x, self._dropout)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's weight of the layer with its adapters."""
        parts = []
        for pair, rows in zip(self.pairs, self._rows_of, strict=True):
            width = weight.shape[1]
            if pair is None:
                parts += [weight.new_zeros(size, width, dtype=torch.float32) for size in rows]
            else:
                a, b = (matrix.detach().float() for matrix in pair)
                parts += ((b @ a) * self._scale).split(rows)
        return (weight.float() + self.row.fuse(parts, self._cut)).to(weight.dtype)


class _MergedWeights(MegatronWeights):
    """The model's weights, each with its adapter added when it is read."""

    def __init__(self, base: MegatronWeights, adapters: Adapters):
        vars(self).update(vars(base))
        self._adapters = adapters

    @torch.no_grad()
    def own_parameter(self, row: WeightRow) -> torch.Tensor | None:
        """This rank's parameter of a row, with its adapter."""
        weight = super().own_parameter(row)
        adapter = self._adapters.by_weight.get(row.names[0])
        return weight if weight is None or adapter is None else adapter.merged(weight)

    def computes(self, row: WeightRow) -> bool:
        """See MegatronWeights."""
        return row.names[0] in self._adapters.by_weight


class _Tree(torch.nn.Module):
    """A chunk's adapters, as a module of their own: so they are in what its DDP wrapper trains."""

    def __init__(self, rows: dict[str, WeightRow]):
        super().__init__()
        self._rows = rows

    def place(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Register a parameter under its dotted name."""
        *path, leaf = name.removeprefix(PARAMETERS).split(".")
        module: torch.nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        module.register_parameter(leaf, parameter)

    def sharded_state_dict(self, prefix: str = "", *_: Any, **__: Any) -> dict[str, Any]:
        """Each parameter with its place in the whole model, for dist_checkpointing."""
        return {
            prefix + name: _sharded(self._rows[PARAMETERS + name], parameter)
            for name, parameter in self.named_parameters()
        }


def _sharded(row: WeightRow, parameter: torch.nn.Parameter) -> ShardedTensor | ShardedTensorFactory:
    tp = parallel_state.get_tensor_model_parallel_group()
    ranks = 1 if row.experts or row.tp_axis is None else tp.size()
    replica = (
        parallel_state.get_expert_data_parallel_rank()
        if row.experts
        else parallel_state.get_data_parallel_rank(with_context_parallel=True)
    )
    is_whole = row.tp_axis is None and not row.experts
    replica_id = (0, tp.rank() if is_whole else 0, replica)

    def place(key: str, data: torch.Tensor, replica_id: Any) -> ShardedTensor:
        offsets = [] if ranks == 1 else [(row.tp_axis, tp.rank(), ranks)]
        return ShardedTensor.from_rank_offsets(key, data, *offsets, replica_id=replica_id)

    if len(row.parts) == 1:
        return place(row.names[0], parameter, replica_id)

    def build(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
        parts = row.split(data, ranks)
        return [place(f"{key}.{i}", part, replica_id) for i, part in enumerate(parts)]

    return ShardedTensorFactory(
        row.names[0], parameter, build, lambda parts: torch.cat(parts), replica_id
    )


def _check_tied(plan: LoraPlan, shape: ModelShape) -> None:
    """Refuse an embedding and an output head that were trained apart, where the model ties them."""
    if not shape.tied or HF_EMBEDDING not in plan.saved or plan.folder is None:
        return
    with SafetensorsReader(plan.folder) as reader:
        embedding, head = (
            reader.shard(PEFT + name, None, 0, 1) for name in (HF_EMBEDDING, HF_OUTPUT)
        )
    if not torch.equal(embedding, head):
        raise ValueError(
            f"policy.lora.path: in the adapter in {plan.folder} embed_tokens and lm_head differ, "
            "and in the base model they are one tensor: train it with PEFT's ensure_weight_tying, "
            "or start from a model with a head of its own"
        )


def _initial_a(row: WeightRow, plan: LoraPlan, seed: int) -> torch.Tensor:
    """A of a new adapter, whole."""
    rng = torch.Generator().manual_seed(hash((seed, zlib.crc32(row.names[0].encode()))) % 2**63)
    a = torch.empty(row.hf_shapes[0])
    if plan.init == "gaussian":
        return a.normal_(0.0, 1.0 / plan.rank, generator=rng)
    return torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)


def _parameter(
    row: WeightRow, value: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.nn.Parameter:
    """This rank's slice of a whole matrix, as a parameter beside the layer's weight."""
    if group is not None and row.tp_axis is not None:
        parts = value.split(row.part_rows) if row.part_rows else [value]
        chunks = [part.chunk(group.size(), dim=row.tp_axis)[group.rank()] for part in parts]
        value = torch.cat(chunks)
    parameter = torch.nn.Parameter(value.to(weight).contiguous())
    # Experts are replicated over other ranks than the rest of the model.
    parameter.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
    if group is not None and row.tp_axis is None:
        parameter.sequence_parallel = True  # type: ignore[attr-defined]
    return parameter


def _numbers(tokens_per_expert: Any) -> list[int]:
    is_tensor = isinstance(tokens_per_expert, torch.Tensor)
    return tokens_per_expert.tolist() if is_tensor else list(tokens_per_expert)
