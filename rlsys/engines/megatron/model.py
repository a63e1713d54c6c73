"""A language model on megatron-core that computes log-probs: one rank of the policy or reference.

Parallel layout, recompute and pipeline schedule are megatron-core's; this module feeds them packed
micro-batches. It would also run under torchrun.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoConfig

from rlsys.algo.batching import (
    PackedMicroBatch,
    micro_batches,
    pack,
    shard_rows,
    unpack_logprobs,
)
from rlsys.algo.context_parallel import chunk_positions, gather_tokens
from rlsys.algo.logprobs import TokenValues
from rlsys.algo.sampling import Sampling
from rlsys.config import RunConfig
from rlsys.config.passed_through import megatron_option_problems
from rlsys.engines.megatron.background import BackgroundWriter
from rlsys.engines.megatron.build import (
    LogprobHead,
    build_model,
    end_at_hidden_states,
    transformer_config,
)
from rlsys.engines.megatron.divergence_head import DivergenceHead
from rlsys.engines.megatron.export import BucketExport
from rlsys.engines.megatron.hf_folder import save_model_folder, untrained_tensors
from rlsys.engines.megatron.packed import packed_seq_params
from rlsys.engines.megatron.routing import ExpertRouting
from rlsys.engines.megatron.saving import begin_model
from rlsys.engines.megatron.stream_export import StreamExport
from rlsys.engines.megatron.weights import MegatronWeights
from rlsys.engines.out_of_memory import out_of_memory_explained
from rlsys.model.families.bridged import is_bridged
from rlsys.model.folder import resolve_model_path
from rlsys.model.folder_check import check_model_folder
from rlsys.model.memory_options import fp8_multiple
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.model.tokenizer_files import num_token_ids
from rlsys.problems import ProblemsError
from rlsys.types import Device, TrainBatch
from rlsys.weight_sync.connection import Connection

if TYPE_CHECKING:
    from rlsys.engines.megatron.bridge import BridgedWeights
    from rlsys.engines.megatron.lora import Adapters
    from rlsys.engines.megatron.trace import StepTrace

ModelWriter = Callable[[Path, Path, Iterator[tuple[str, torch.Tensor]], torch.dtype], None]
"""Function that writes a model folder: see `save_model_folder`."""
Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Of a micro-batch, and further results."""
LossOf = Callable[[Any, PackedMicroBatch], Loss]
"""(what the head computes of tokens, such as TokenValues; micro-batch) -> loss."""
Head = Callable[[torch.Tensor, PackedMicroBatch, torch.Tensor], Any]
"""(hidden states, micro-batch, positions) -> a named tuple: values of the tokens, or None."""

LOGPROBS = ("logprobs", "entropy")
"""Fields of TokenValues."""


class MegatronModel:
    """A model that computes log-probs. Call `initialize_parallel` first."""

    role = "policy"
    """Section of the config with the model's parallel sizes."""
    adapters: Adapters | None = None
    """The LoRA adapter beside the weights, if there is one."""
    saves_adapter: bool = False
    """Whether what a run saves as its model is the adapter alone."""
    config_changes: Mapping[str, Any] = MappingProxyType({})
    """Keys of config.json that a saved model has otherwise than the folder that it comes from."""
    trace: StepTrace | None = None
    """Looks at all that is computed, in `rlsys replay`."""

    def __init__(self, config: RunConfig, path: str, *, device: Device, trains: bool = False):
        if problems := megatron_option_problems(config):  # this host may have another megatron-core
            raise ProblemsError("policy.megatron_kwargs", problems)
        self.config = config
        self.on_cpu = device == "cpu"
        self.device = torch.device(device)
        self.folder = resolve_model_path(path)
        self.dtype = getattr(torch, config.model_dtype(on_cpu=self.on_cpu))
        bridges = config.may_bridge(on_cpu=self.on_cpu)
        shape = read_model_shape(self.folder, may_bridge=bridges, num_labels=config.num_labels)
        self.shape = shape
        # Preflight has not seen the files of a hub model, nor those on another host.
        check_model_folder(self.folder, shape, has_prompts=False)
        self._is_bridged = is_bridged(config, shape)
        self.hf_config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.transformer_config = transformer_config(
            self.hf_config,
            shape,
            dtype=self.dtype,
            policy=config.policy,
            on_cpu=self.on_cpu,
            trains=trains,
            bridged=self._is_bridged,
        )
        with out_of_memory_explained(f"the {self.role}'s weights: {self.more_gpus}"):
            self._build(shape)
            self._load_weights()
        self.routing = None
        if shape.is_moe and not self._is_bridged:
            replays = self.role == "policy" and config.replays_routing
            self.routing = ExpertRouting(
                self.model, shape.expert_layers, config.policy, replays=replays
            )
        self._head: Head | None = None
        if self.is_last_stage:
            end_at_hidden_states(self.model[-1])
            self._head = self._make_head(trains=trains)
        self._has_scales = (
            config.policy.fp8_format is not None and config.policy.fp8_recipe == "delayed"
        )
        self._unknown_scales = self._has_scales
        """Whether FP8 tensors have the scale 1 still, which small numbers do not survive."""
        self.writer = BackgroundWriter(config.policy.timeout_s)
        """Writes the files of checkpoints."""
        self._dp_rank = parallel_state.get_data_parallel_rank()
        self._dp_size = parallel_state.get_data_parallel_world_size()
        self._cp_group = parallel_state.get_context_parallel_group()

    def _build(self, shape: ModelShape) -> None:
        """Make the chunks of the model and its weight table, rlsys's or mcore-bridge's."""
        self.weights: MegatronWeights | BridgedWeights
        if self._is_bridged:
            from rlsys.engines.megatron.bridge import BridgedWeights, build_bridged_model

            model = build_bridged_model(self.transformer_config).to(self.device)
            self.model = torch.nn.ModuleList([model])
            self.weights = BridgedWeights(model, self.transformer_config)
        else:
            chunks = build_model(
                self.hf_config,
                shape,
                self.transformer_config,
                longest=self.config.longest_row,
                on_cpu=self.on_cpu,
            )
            self.model = torch.nn.ModuleList(chunks).to(self.device)
            self.weights = MegatronWeights(self.model, shape)

    def _load_weights(self) -> None:
        self.weights.load(self.folder)

    def _make_head(self, *, trains: bool) -> Head:
        """What turns the last stage's hidden states into what a loss is computed from."""
        config = self.config
        head = LogprobHead(self.model[-1], config, self._sampling(self.shape.vocab_size))
        if not self.on_cpu:
            head.warm_up(trains=trains, entropy_bonus=config.algorithm.entropy_coef > 0)
        if trains and config.divergence is not None:
            return DivergenceHead(head, config, self.dtype, self.device)
        return head

    def export_to(self, connection: Connection) -> BucketExport | StreamExport:
        """This rank's part in filling the buckets of a weight sync connection."""
        weights = self.weights
        if self.adapters is not None and connection.content != "base":
            is_adapter = connection.content == "adapter"
            weights = self.adapters.weights if is_adapter else self.adapters.merged
        if isinstance(weights, MegatronWeights) and not weights.has_fp8:
            return BucketExport(weights, connection)
        return StreamExport(weights.export, connection)

    def _sampling(self, vocab_size: int) -> Sampling:
        """How the rollout engines sample, by the policy's tokenizer."""
        known = None
        if self.config.has_rollouts:  # else every embedding of the model is in its distribution
            known = num_token_ids(resolve_model_path(self.config.model.path))
        # Beyond the vocabulary are the rows that fill it up for tensor parallelism.
        return Sampling(num_token_ids=min(known or vocab_size, vocab_size), **self.config.sampling)

    @property
    def more_gpus(self) -> str:
        """Remedy for a model that is too large for a GPU."""
        return f"raise {self.role}.tensor_parallel_size"

    @property
    def _experts_span_data_parallel_ranks(self) -> bool:
        # Ranks of an expert group are neighbours, counted from 0; those with the same rows too.
        parallel = self.transformer_config
        same_rows = parallel.tensor_model_parallel_size * self._cp_group.size()
        return same_rows % parallel.expert_model_parallel_size != 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the end of the model."""
        return self.model[-1].post_process

    @property
    def reports(self) -> bool:
        """Whether this rank returns the results of its model replica."""
        return (
            self.is_last_stage
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and self._cp_group.rank() == 0
        )

    @torch.no_grad()
    def compute_logprobs(
        self, batch: TrainBatch, values: Sequence[str] = LOGPROBS
    ) -> tuple[list[int], torch.Tensor] | None:
        """Log-probs and entropies of this data-parallel rank's share of the rows.

        Args:
            values: fields of TokenValues to return.

        Returns:
            (row indices, [len(values), len(rows), S] float32, log-probs and entropies in nats), or
            None on ranks that do not report.
        """
        shards = self._shard(range(len(batch.lengths)), batch)
        rows = shards[self._dp_rank]
        packed, row_lists = self._pack(batch, shards, torch.zeros(batch.input_ids.shape))

        def collect(of_tokens: TokenValues, _: PackedMicroBatch) -> Loss:
            stacked = torch.stack([getattr(of_tokens, name) for name in values])
            return stacked.new_zeros(()), {"values": stacked}

        outputs = self._forward_only(packed, collect)
        if not self.reports:
            return None
        result = torch.zeros(len(values), *batch.input_ids.shape, dtype=torch.float32)
        for output, micro_batch, micro_rows in zip(outputs, packed, row_lists, strict=True):
            for of_rows, out in zip(output["values"].cpu(), result, strict=True):
                unpack_logprobs(of_rows, micro_batch, out, micro_rows)
        return rows, result[:, rows]

    def whole_weights(self) -> MegatronWeights | BridgedWeights:
        """The weights of the whole model, with adapters merged into them."""
        return self.weights if self.adapters is None else self.adapters.merged

    def _forward_only(
        self, packed: list[PackedMicroBatch], collect: LossOf
    ) -> list[dict[str, torch.Tensor]]:
        """The further results of `collect` for each micro-batch; see `_forward_backward`."""
        if self._unknown_scales:  # only a pass that could have gradients finds them
            with torch.enable_grad():
                self._forward_backward(packed, collect, chunks=self.model, forward_only=True)
            self._unknown_scales = False
        self.model.eval()
        outputs = self._forward_backward(packed, collect, chunks=self.model, forward_only=True)
        self.model.train()
        return outputs

    def save_model(self, folder: Path, write: ModelWriter = save_model_folder) -> None:
        """Write a Hugging Face model folder; every rank calls, the first one writes."""
        tensors = self.whole_weights().export()
        try:
            if dist.get_rank() == 0:
                own = chain(tensors, untrained_tensors(self.folder, shape=self.shape))
                write(self.folder, folder, own, self.dtype)
        finally:  # takes part in the collectives, also where the disk is full
            for _ in tensors:
                pass
        dist.barrier()

    def begin_model(self, folder: Path) -> None:
        """Start writing the model's files into an existing folder; every rank calls."""
        begin_model(self, folder)

    def _shard(self, rows: Sequence[int], batch: TrainBatch) -> list[list[int]]:
        """The rows of each data-parallel rank."""
        lengths, together = batch.lengths.tolist(), self.config.rows_together
        return shard_rows(rows, lengths, num_shards=self._dp_size, together=together)

    def _pack(
        self, batch: TrainBatch, shards: list[list[int]], weights: torch.Tensor
    ) -> tuple[list[PackedMicroBatch], list[list[int]]]:
        """Micro-batches of this data-parallel rank's shard, and the rows of each.

        Micro-batches have equal sizes if pipeline stages exchange them. Data-parallel ranks have
        equal numbers of micro-batches if they exchange tokens for their experts, and interleaved
        pipeline stages take groups of pipeline_parallel_size: the last micro-batches may repeat a
        row, train nothing, and have rows [].
        """
        policy = self.config.policy
        tp, cp = self.transformer_config.tensor_model_parallel_size, self._cp_group.size()
        # Context parallelism cuts each sequence into chunks, sequence parallelism a rank's tokens.
        sequence_multiple = 2 * cp if cp > 1 else 1
        if self.routing is not None:
            batch = self.routing.own_layers(batch)
        token_multiple = math.lcm(sequence_multiple, tp * cp * fp8_multiple(policy))
        lengths = batch.lengths.tolist()
        cut = partial(
            micro_batches,
            lengths=lengths,
            micro_batch_size=policy.micro_batch_size,
            max_tokens=policy.max_tokens_per_micro_batch,
            together=self.config.rows_together,
        )
        row_lists_of_ranks = [cut(shard) for shard in shards]
        row_lists = row_lists_of_ranks[self._dp_rank]
        total_tokens, stages = None, self.transformer_config.pipeline_model_parallel_size
        if stages > 1:
            filled = [-(-length // sequence_multiple) * sequence_multiple for length in lengths]
            longest = max(sum(filled[row] for row in rows) for rows in row_lists)
            total_tokens = -(-longest // token_multiple) * token_multiple
        pack_rows = partial(
            pack,
            multiple_of=token_multiple,
            sequence_multiple_of=sequence_multiple,
            total_tokens=total_tokens,
        )
        packed = [pack_rows(batch, rows, weights) for rows in row_lists]
        wanted = len(packed)
        if self._experts_span_data_parallel_ranks:
            wanted = max(map(len, row_lists_of_ranks))
        if len(self.model) > 1:
            wanted = -(-wanted // stages) * stages
        if missing := wanted - len(packed):
            no_token = torch.zeros_like(batch.completion_mask)
            untrained = replace(batch, completion_mask=no_token, is_chosen=None, ref_logps=None)
            shortest = [min(shards[self._dp_rank], key=lengths.__getitem__)]
            repeated = pack_rows(untrained, shortest, torch.zeros_like(weights))
            nothing = torch.zeros_like(repeated.is_token)
            packed += missing * [replace(repeated, is_token=nothing, rows=())]
            row_lists += missing * [[]]
        return packed, row_lists

    def _forward_backward(
        self,
        packed: list[PackedMicroBatch],
        loss_of: LossOf,
        *,
        chunks: Iterable[torch.nn.Module],
        forward_only: bool,
    ) -> list[dict[str, torch.Tensor]]:
        """Run megatron-core's schedule on the chunks of the model, bare or in DDP wrappers.

        Returns:
            the further results of `loss_of` for each micro-batch, on the last pipeline stage.
        """
        tokens, chunks = max(len(micro_batch.input_ids) for micro_batch in packed), list(chunks)
        recompute = ""
        if not forward_only and self.config.policy.recompute != "full":
            recompute = "set policy.recompute to selective or full, "
        with out_of_memory_explained(
            f"the {self.role}'s {'log-probs' if forward_only else 'update'} in micro-batches of "
            f"{tokens:,} tokens: lower policy.max_tokens_per_micro_batch (or "
            f"policy.micro_batch_size), {recompute}or {self.more_gpus}"
        ):
            return get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, loss_of),
                data_iterator=[iter(packed) for _ in chunks] if len(chunks) > 1 else iter(packed),
                model=chunks,
                num_microbatches=len(packed),
                seq_length=len(packed[0].input_ids),
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _forward_step(
        self, loss_of: LossOf, packed: Iterator[PackedMicroBatch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Hidden states of the next micro-batch, and the function that computes their loss."""
        micro_batch = next(packed)
        positions = chunk_positions(micro_batch.cu_seqlens, self._cp_group.size())
        micro_batch, positions = micro_batch.to(self.device), positions.to(self.device)
        own = positions[self._cp_group.rank()]
        if self.routing is not None:
            self.routing.begin_micro_batch(micro_batch, own)
        if self.trace is not None:
            self.trace.begin(micro_batch, own)
        hidden = model(
            micro_batch.input_ids[own][None],
            micro_batch.position_ids[own][None],
            attention_mask=None,
            packed_seq_params=packed_seq_params(micro_batch, self._cp_group.size()),
        )

        def loss(hidden: torch.Tensor) -> Loss:
            assert self._head is not None, "only the last pipeline stage has a loss"
            found = self._head(hidden, micro_batch, own)
            shared = {"positions_CT": positions, "group": self._cp_group, "sum_gradients": False}
            values = (None if v is None else gather_tokens(v, **shared) for v in found)
            return loss_of(type(found)(*values), micro_batch)

        return hidden, loss
