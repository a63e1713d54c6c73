"""The trained (policy) or frozen (reference) language model on megatron-core: one rank of it.

No Ray here: the same classes run under torchrun. Parallel layout, optimizer, clipping, learning
rate, recompute and pipeline schedule are megatron-core's; this module feeds them packed
micro-batches and the loss of `rlsys.algo`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from transformers import AutoConfig

from rlsys.algo.batching import (
    PackedMicroBatch,
    micro_batches,
    optimizer_step_rows,
    pack,
    shard_rows,
    unpack_logprobs,
)
from rlsys.algo.context_parallel import chunk_positions, gather_tokens
from rlsys.algo.losses import LossInput, losses
from rlsys.algo.metrics import MetricSums, combine_optimizer_steps
from rlsys.algo.names import aggregation_of
from rlsys.algo.weighting import keep_high_entropy, loss_weights
from rlsys.config import Config, GrpoConfig
from rlsys.engines.hf_checkpoint import SafetensorsReader, resolve_model_path, save_model_folder
from rlsys.engines.megatron_checkpoint import load_policy, save_policy
from rlsys.engines.megatron_model import (
    LogprobHead,
    build_model,
    fuse_weight_gradients,
    transformer_config,
)
from rlsys.engines.megatron_weights import MegatronWeights
from rlsys.model_shape import read_model_shape
from rlsys.types import TrainBatch, UpdateOutput


@dataclass(frozen=True)
class ParallelLayout:
    """Where this rank stands among those that share one model."""

    rank: int
    world_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_model_parallel_size: int
    context_parallel_size: int
    timeout_s: float


def initialize_parallel(layout: ParallelLayout, store: dist.Store, *, seed: int) -> None:
    """Join the process group, at a store that all ranks share, and build megatron-core's on it."""
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=layout.rank,
        world_size=layout.world_size,
        timeout=timedelta(seconds=layout.timeout_s),
    )
    parallel_state.initialize_model_parallel(
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # an expert is small enough to be whole on a rank
        context_parallel_size=layout.context_parallel_size,
        distributed_timeout_minutes=max(1, math.ceil(layout.timeout_s / 60)),
    )
    model_parallel_cuda_manual_seed(seed)


class MegatronModel:
    """A model that computes log-probs: all that the reference needs, the policy's base.

    `initialize_parallel` comes first.
    """

    def __init__(self, config: Config, path: str, *, trains: bool = False):
        self.config = config
        self.on_cpu = not torch.cuda.is_available()
        self.device = torch.device("cpu" if self.on_cpu else "cuda")
        self.folder = resolve_model_path(path)
        self.dtype = getattr(torch, config.model_dtype(on_cpu=self.on_cpu))
        shape = read_model_shape(self.folder)  # refuses what is not supported
        self.hf_config = AutoConfig.from_pretrained(self.folder)
        self.transformer_config = transformer_config(
            self.hf_config,
            shape,
            dtype=self.dtype,
            policy=config.policy,
            on_cpu=self.on_cpu,
        )
        self.model = build_model(self.hf_config, self.transformer_config).to(self.device)
        self.weights = MegatronWeights(
            self.model,
            shape,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            ep_group=parallel_state.get_expert_model_parallel_group(),
        )
        with SafetensorsReader(self.folder) as reader:
            self.weights.load(reader)
        self._head = None
        if self.model.post_process:
            recompute = config.policy.recompute_logits
            self._head = LogprobHead(self.model, recompute_logits=recompute)
            if not self.on_cpu:
                self._head.warm_up(
                    config.rollout.temperature,
                    trains=trains,
                    entropy_bonus=config.grpo.entropy_coef > 0,
                )
        self._dp_rank = parallel_state.get_data_parallel_rank()
        self._dp_size = parallel_state.get_data_parallel_world_size()
        self._cp_group = parallel_state.get_context_parallel_group()

    @property
    def _experts_span_data_parallel_ranks(self) -> bool:
        # Ranks of the expert group are neighbours: tensor-parallel ranks come first.
        return (
            self.transformer_config.expert_model_parallel_size
            > self.transformer_config.tensor_model_parallel_size
        )

    @property
    def reports(self) -> bool:
        """Whether this rank is the one of its model replica that returns results."""
        return (
            self.model.post_process
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and self._cp_group.rank() == 0
        )

    @torch.no_grad()
    def compute_logprobs(
        self, batch: TrainBatch, *, with_entropies: bool = False
    ) -> tuple[list[int], torch.Tensor] | None:
        """Log-probs of this data-parallel rank's share of the rows, at the sampling temperature.

        Returns:
            (row indices, [K, len(rows), S] float32), or None on ranks that do not report. K is 1,
            or 2 with the entropies of the predictions.
        """
        shards = shard_rows(
            list(range(len(batch.lengths))), batch.lengths.tolist(), num_shards=self._dp_size
        )
        rows = shards[self._dp_rank]
        packed, row_lists = self._pack(batch, shards, torch.zeros(batch.input_ids.shape))

        def collect(logprobs: torch.Tensor, entropies: torch.Tensor, _: PackedMicroBatch):
            values = [logprobs, entropies] if with_entropies else [logprobs]
            return logprobs.new_zeros(()), {"values": torch.stack(values)}

        self.model.eval()
        outputs = self._forward_backward(packed, collect, forward_only=True)
        self.model.train()
        if not self.reports:
            return None
        result = torch.zeros(1 + with_entropies, *batch.input_ids.shape, dtype=torch.float32)
        for output, micro_batch, micro_rows in zip(outputs, packed, row_lists, strict=True):
            for values, out in zip(output["values"].cpu(), result, strict=True):
                unpack_logprobs(values, micro_batch, out, micro_rows)
        return rows, result[:, rows]

    def save_model(self, folder: Path) -> None:
        """Write a Hugging Face model folder; every rank calls, the first one writes."""
        tensors = self.weights.export()
        if dist.get_rank() == 0:
            save_model_folder(self.folder, folder, tensors, self.dtype)
        else:
            for _ in tensors:  # takes part in the collectives
                pass
        dist.barrier()

    def _pack(
        self, batch: TrainBatch, shards: list[list[int]], weights: torch.Tensor
    ) -> tuple[list[PackedMicroBatch], list[list[int]]]:
        """Micro-batches of this rank's one of `shards`; the rows of those that only fill are [].

        Micro-batches are of equal size where pipeline stages exchange them, and equally many where
        data-parallel ranks exchange tokens for their experts.
        """
        policy = self.config.policy
        tp, cp = self.transformer_config.tensor_model_parallel_size, self._cp_group.size()
        # Context parallelism cuts each sequence into chunks, sequence parallelism what a rank has.
        of_sequence = 2 * cp if cp > 1 else 1
        of_all = math.lcm(of_sequence, tp * cp)
        lengths = batch.lengths.tolist()
        row_lists_of_ranks = [
            micro_batches(
                rows,
                lengths,
                micro_batch_size=policy.micro_batch_size,
                max_tokens=policy.max_tokens_per_micro_batch,
            )
            for rows in shards
        ]
        row_lists = row_lists_of_ranks[self._dp_rank]
        total_tokens = None
        if self.transformer_config.pipeline_model_parallel_size > 1:
            filled = [math.ceil(length / of_sequence) * of_sequence for length in lengths]
            longest = max(sum(filled[row] for row in rows) for rows in row_lists)
            total_tokens = math.ceil(longest / of_all) * of_all
        packed = [
            pack(
                batch,
                rows,
                weights,
                multiple_of=of_all,
                sequence_multiple_of=of_sequence,
                total_tokens=total_tokens,
            )
            for rows in row_lists
        ]
        if self._experts_span_data_parallel_ranks:
            missing = max(map(len, row_lists_of_ranks)) - len(packed)
            untrained = replace(batch, completion_mask=torch.zeros_like(batch.completion_mask))
            shortest = [min(shards[self._dp_rank], key=lengths.__getitem__)]
            packed += missing * [
                pack(
                    untrained,
                    shortest,
                    torch.zeros_like(weights),
                    multiple_of=of_all,
                    sequence_multiple_of=of_sequence,
                    total_tokens=total_tokens,
                )
            ]
            row_lists = row_lists + missing * [[]]
        return packed, row_lists

    def _forward_backward(
        self,
        packed: list[PackedMicroBatch],
        loss_of: Callable[
            [torch.Tensor, torch.Tensor, PackedMicroBatch], tuple[torch.Tensor, dict]
        ],
        *,
        forward_only: bool,
        model: torch.nn.Module | None = None,
    ) -> list[dict]:
        """Run megatron-core's schedule; `loss_of(logprobs_T, entropy_T, micro_batch)` ends it.

        Returns:
            the second result of `loss_of` of every micro-batch, on the last pipeline stage.
        """

        def forward_step(micro_batches: Iterator[PackedMicroBatch], model: torch.nn.Module):
            micro_batch = next(micro_batches)
            positions = chunk_positions(micro_batch.cu_seqlens, self._cp_group.size())
            micro_batch, positions = micro_batch.to(self.device), positions.to(self.device)
            own = positions[self._cp_group.rank()]
            hidden = model(
                micro_batch.input_ids[own][None],
                micro_batch.position_ids[own][None],
                attention_mask=None,
                packed_seq_params=_packed_seq_params(micro_batch, self._cp_group.size()),
            )

            def loss(hidden: torch.Tensor):
                assert self._head is not None, "only the last pipeline stage has a loss"
                logprobs, entropy = (
                    gather_tokens(values, positions, self._cp_group, sum_gradients=False)
                    for values in self._head(
                        hidden, micro_batch.targets[own], self.config.rollout.temperature
                    )
                )
                return loss_of(logprobs, entropy, micro_batch)

            return hidden, loss

        with _out_of_memory_explained(packed):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(packed),
                model=[model or self.model],
                num_microbatches=len(packed),
                seq_length=len(packed[0].input_ids),
                micro_batch_size=1,
                forward_only=forward_only,
            )


def _packed_seq_params(
    micro_batch: PackedMicroBatch, context_parallel_size: int
) -> PackedSeqParams:
    # Transformer Engine wants to be told under context parallelism, and by the same object, that
    # sequences are not padded: what fills them is a part of them that nothing attends to.
    padded = micro_batch.cu_seqlens if context_parallel_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=micro_batch.cu_seqlens,
        cu_seqlens_kv=micro_batch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=micro_batch.max_seqlen,
        max_seqlen_kv=micro_batch.max_seqlen,
    )


@contextmanager
def _out_of_memory_explained(packed: list[PackedMicroBatch]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # What extensions run out of, Transformer Engine's among them, may come as its base class.
        if "out of memory" not in str(error):
            raise
        tokens = max(len(micro_batch.input_ids) for micro_batch in packed)
        raise torch.OutOfMemoryError(
            f"{error}\nThe GPU is too small for micro-batches of {tokens:,} tokens: lower "
            "policy.max_tokens_per_micro_batch (or policy.micro_batch_size), set policy.recompute "
            "to selective or full, or raise policy.tensor_parallel_size; `rlsys explain` estimates "
            "what each would take"
        ) from None


class MegatronPolicy(MegatronModel):
    """The model with its optimizer: updated from batches, exported to rollout engines."""

    def __init__(self, config: Config):
        super().__init__(config, config.model.path, trains=True)
        policy = config.policy
        overlap_grads = config.overlaps_grad_reduce(on_cpu=self.on_cpu)
        self._overlaps_param_gather = config.overlaps_param_gather(on_cpu=self.on_cpu)
        fuse_weight_gradients(self.model)
        self.ddp = DistributedDataParallel(
            self.transformer_config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=policy.use_distributed_optimizer,
                overlap_grad_reduce=overlap_grads,
                overlap_param_gather=self._overlaps_param_gather,
            ),
            self.model,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=policy.lr,
                min_lr=policy.min_lr,
                weight_decay=policy.weight_decay,
                adam_beta1=policy.adam_beta1,
                adam_beta2=policy.adam_beta2,
                adam_eps=policy.adam_eps,
                clip_grad=policy.max_grad_norm,
                bf16=self.dtype == torch.bfloat16,
                params_dtype=self.dtype,
                use_distributed_optimizer=policy.use_distributed_optimizer,
                overlap_param_gather=self._overlaps_param_gather,
            ),
            [self.ddp],
        )
        if overlap_grads:
            # Gradients are summed over ranks during the last micro-batch only.
            self.transformer_config.no_sync_func = self.ddp.no_sync
        self.transformer_config.finalize_model_grads_func = finalize_model_grads
        self.transformer_config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = self._build_scheduler()
        self.policy_version = 0

    def _build_scheduler(self) -> OptimizerParamScheduler:
        policy = self.config.policy
        total = self.config.max_steps * self.config.optimizer_steps_per_rollout
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=policy.lr,
            min_lr=policy.min_lr,
            lr_warmup_steps=math.ceil(policy.warmup_ratio * total),
            # The scheduler is stepped before each update, so that the first one already moves;
            # one more than `total` keeps the last one from being at min_lr, which may be 0.
            lr_decay_steps=total + 1,
            lr_decay_style=policy.lr_scheduler_type,
            start_wd=policy.weight_decay,
            end_wd=policy.weight_decay,
            wd_incr_steps=total,
            wd_incr_style="constant",
        )

    def update(self, batch: TrainBatch, *, loss: str | None = None) -> UpdateOutput | None:
        """All optimizer steps of one rollout; raises policy_version by one.

        An optimizer step that has no tokens to train on, because all its completions are dropped
        or cut, is left out.

        Args:
            batch: the whole generation batch; each data-parallel rank takes its own rows of it.
            loss: name of a registered loss, None for grpo.loss_type; "sft" for a supervised warm
                start.

        Returns:
            metrics reduced over ranks, on one rank; None on the others.
        """
        steps = optimizer_step_rows(
            len(batch.lengths),
            global_batch_size=self.config.global_batch_size,
            num_iterations=self.config.grpo.num_iterations,
            # A hash of integers is the same in every process.
            seed=hash((self.config.seed, self.policy_version)),
        )
        metrics = [
            self._optimizer_step(batch, rows, loss or self.config.grpo.loss_type)
            for rows in steps
            if batch.completion_mask[rows].any()
        ]
        if self._overlaps_param_gather:
            # The last optimizer step left this to a forward pass, but log-probs, weight sync and
            # checkpoints come first: until here, ranks have new weights in their own part only.
            self.ddp.start_param_sync(force_sync=True)
        if not self.on_cpu and self.config.reference.placement == "policy":
            torch.cuda.empty_cache()  # for the reference, which may share this GPU
        self.policy_version += 1
        if not self.reports or self._dp_rank != 0:
            return None
        return UpdateOutput(self.policy_version, combine_optimizer_steps(metrics))

    def _optimizer_step(self, batch: TrainBatch, rows: list[int], loss: str) -> dict[str, float]:
        """One step on completions `rows` of `batch`: forward, backward, clip, AdamW."""
        algorithm: GrpoConfig = self.config.algorithm
        weights = loss_weights(
            batch.completion_mask,
            rows=rows,
            kept_N=batch.kept,
            aggregation=aggregation_of(loss, algorithm.loss_aggregation),
            max_completion_length=self.config.rollout.max_completion_length,
        )
        if batch.entropies is not None:
            advantages = keep_high_entropy(
                batch.advantages,
                batch.entropies,
                batch.completion_mask,
                rows=rows,
                quantile=algorithm.top_entropy_quantile,
            )
            batch = replace(batch, advantages=advantages)
        # What has no token to train on is not computed, unless a rank would be left with nothing.
        trained = [row for row in rows if batch.completion_mask[row].any()]
        rows = trained if len(trained) >= self._dp_size else rows
        shards = shard_rows(rows, batch.lengths.tolist(), num_shards=self._dp_size)
        packed, _ = self._pack(batch, shards, weights)
        # The weights already hold the global denominator. megatron-core's schedule divides by the
        # number of micro-batches and its DDP by the number of replicas: both are undone here. (Over
        # context-parallel ranks it averages too, which the schedule has multiplied by already.)
        undo_averaging = len(packed) * self._dp_size

        def loss_of(logprobs: torch.Tensor, entropy: torch.Tensor, micro_batch: PackedMicroBatch):
            inputs = LossInput.from_packed(micro_batch, logprobs, entropy)
            value, statistics = losses[loss](inputs, algorithm)
            return value * undo_averaging, statistics

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._forward_backward(packed, loss_of, forward_only=False, model=self.ddp)
        metrics = self._reduced_metrics(outputs)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            self._refuse_step(grad_norm, metrics)
        self.scheduler.step(increment=1)
        self.optimizer.step()
        return metrics | {
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def _reduced_metrics(self, outputs: list[dict]) -> dict[str, float]:
        """Of one optimizer step, over data-parallel ranks; only the last pipeline stage has any."""
        if not self.model.post_process:
            return {}
        sums = MetricSums()
        for statistics in outputs:
            sums.add(statistics)
        sums.all_reduce(parallel_state.get_data_parallel_group())
        return sums.means()

    def _refuse_step(self, grad_norm: float, metrics: dict[str, float]) -> NoReturn:
        """Raise, on every rank alike, before NaN reaches the weights."""
        told = [metrics]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            dist.broadcast_object_list(
                told,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        values = ", ".join(f"{name} {value:g}" for name, value in told[0].items())
        raise FloatingPointError(
            f"the update of policy version {self.policy_version} has a gradient of norm "
            f"{grad_norm:g}, which was not applied: the weights are as before this optimizer step. "
            f"Its metrics: {values}"
        )

    def save_checkpoint(self, folder: Path) -> None:
        """Write what continuing exactly needs into an empty folder; every rank calls."""
        save_policy(
            folder, self.model, self.optimizer, self.scheduler, policy_version=self.policy_version
        )

    def load_checkpoint(self, folder: Path) -> int:
        """Continue from a checkpoint; returns its policy_version."""
        self.policy_version = load_policy(folder, self.model, self.optimizer, self.scheduler)
        return self.policy_version
