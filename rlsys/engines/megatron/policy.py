"""One rank of the policy: the loss of `rlsys.algo` with megatron-core's optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads

from rlsys.algo.batching import PackedMicroBatch, optimizer_step_rows
from rlsys.algo.finite import count_nonfinite
from rlsys.algo.losses import LossInput, compute_loss
from rlsys.algo.update_metrics import combine_optimizer_steps, reduced_means
from rlsys.algo.weighting import choose_tokens, loss_weights
from rlsys.config import Config, GrpoConfig, RunConfig
from rlsys.engines.megatron.build import fuse_weight_gradients
from rlsys.engines.megatron.checkpoint import check_checkpoint, load_optimizer
from rlsys.engines.megatron.hf_folder import save_model_folder
from rlsys.engines.megatron.model import LOGPROBS, Loss, LossOf, MegatronModel, ModelWriter
from rlsys.engines.megatron.nonfinite import NonFiniteSteps, check_finite, find_nonfinite
from rlsys.engines.megatron.offload import Offload
from rlsys.engines.megatron.on_cpu import return_free_memory
from rlsys.engines.megatron.optimizer import (
    build_optimizer,
    build_scheduler,
    gradient_config,
    optimizer_tensors,
    step_prepared,
)
from rlsys.engines.megatron.saving import begin_checkpoint
from rlsys.engines.megatron.trained import base_name, choose_trained, trained_weights
from rlsys.engines.out_of_memory import out_of_memory_explained
from rlsys.engines.step_dump import Step
from rlsys.files import replacing_folder
from rlsys.model.adapter_folder import is_adapter_folder
from rlsys.model.policy_memory import optimizer_bytes
from rlsys.types import Device, TrainBatch, UpdateOutput

UPDATES_PER_TRIM = 50
"""On CPU; taking memory from the system again costs a quarter of an update of a tiny model."""


class MegatronPolicy(MegatronModel):
    """The model with its optimizer: updated from batches, exported to rollout engines."""

    def __init__(self, config: RunConfig, *, device: Device):
        super().__init__(config, config.model.path, device=device, trains=True)
        overlap_grads = config.overlaps_grad_reduce(on_cpu=self.on_cpu)
        self._overlaps_param_gather = config.overlaps_param_gather(on_cpu=self.on_cpu)
        self.adapters = choose_trained(config, self.model, self.weights, self.shape)
        self.saves_adapter = self.adapters is not None
        fuse_weight_gradients(self.model)
        with out_of_memory_explained(f"the policy's gradients in fp32: {self.more_gpus}"):
            ddp_config = gradient_config(
                config.policy,
                overlap_grads=overlap_grads,
                overlap_params=self._overlaps_param_gather,
            )
            self.ddp = [
                DistributedDataParallel(
                    self.transformer_config,
                    ddp_config,
                    chunk,
                    # One part of each later chunk is enough: other chunks compute meanwhile.
                    disable_bucketing=number > 0,
                )
                for number, chunk in enumerate(self.model)
            ]
        with out_of_memory_explained(
            f"the optimizer's copy of the weights: {self._more_gpus_for_optimizer}"
        ):
            self.optimizer = build_optimizer(
                config.policy,
                self.ddp,
                dtype=self.dtype,
                overlap_params=self._overlaps_param_gather,
            )
        if overlap_grads:
            # Gradients are summed over ranks during the last micro-batch only.
            no_sync = [chunk.no_sync for chunk in self.ddp]
            self.transformer_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.transformer_config.finalize_model_grads_func = finalize_model_grads
        self.transformer_config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = build_scheduler(config, self.optimizer)
        self._unknown_gradient_scales = self._unknown_scales
        self.policy_version = 0
        self.offload = Offload(
            self.model, self.ddp, self.optimizer, self.adapters, moves=not self.on_cpu
        )
        """Moves what this rank holds to host memory while other models need the GPU, and back."""
        if isinstance(config, Config) and config.is_colocated:
            self._reserve_host_memory(config)
        self.nonfinite = NonFiniteSteps(config, self.shape)
        self._is_mid_update = False
        """Whether an update has changed the weights and has not ended."""

    def _reserve_host_memory(self, config: Config) -> None:
        device: Device = "cpu" if self.on_cpu else "cuda"
        leaves = config.colocated.offload_optimizer
        self.offload.reserve(
            optimizer_bytes(config, self.shape, device) if leaves else 0,
            weights=self.weights_leave,
        )

    @property
    def weights_leave(self) -> bool:
        """colocated.offload_weights, decided for this rank's GPU."""
        assert isinstance(self.config, Config)
        leaves = self.config.colocated.offload_weights
        return self.offload.has_large_weights if leaves == "auto" else leaves

    @property
    def more_gpus(self) -> str:
        """Remedy for a model that is too large for a GPU."""
        return "raise policy.tensor_parallel_size or policy.pipeline_parallel_size"

    @property
    def _more_gpus_for_optimizer(self) -> str:
        return (
            f"{self.more_gpus}, or policy.world_size with policy.use_distributed_optimizer, which "
            "cuts the optimizer's state over replicas"
        )

    def update(self, batch: TrainBatch, *, loss: str | None = None) -> UpdateOutput | None:
        """Take all optimizer steps of one rollout; raises policy_version by one.

        Steps without tokens to train on, because all completions are dropped or cut, are skipped,
        and so are those that are not finite: see `NonFiniteSteps`.

        Args:
            batch: the whole generation batch; each data-parallel rank takes its rows.
            loss: name of a registered loss, such as "sft"; None is grpo.loss_type.

        Returns:
            metrics reduced over ranks, on one rank; None on the others. With `rolls_back`, the
            update is not finished, and policy_version is as before.

        Raises:
            FloatingPointError: a step is not finite, and policy.on_nonfinite says that this ends
                the run; the weights are as before that step.
        """
        self.offload.check("update", optimizer=True)
        steps = optimizer_step_rows(
            len(batch.lengths),
            global_batch_size=self.config.global_batch_size,
            num_iterations=self.config.algorithm.num_iterations,
            # A hash of integers is the same in every process.
            seed=hash((self.config.seed, self.policy_version)),
        )
        metrics, num_skipped = [], 0
        for number, rows in enumerate(steps, start=1):
            if not batch.completion_mask[rows].any():
                continue
            step = Step(batch, rows, loss, self.policy_version, f"{number} of {len(steps)}")
            of_step = self._optimizer_step(step)
            if of_step is not None:
                metrics.append(of_step)
            elif self.nonfinite.rolls_back:
                return UpdateOutput(self.policy_version, {}, rolls_back=self.nonfinite.last)
            else:
                num_skipped += 1
        self._gather_weights()
        if not self.on_cpu and self.config.policy_shares_gpus:
            # Free cached blocks for the models that share this GPU. Otherwise keep them:
            # reallocating slows every update.
            torch.cuda.empty_cache()
        self.policy_version += 1
        if self.on_cpu and self.policy_version % UPDATES_PER_TRIM == 0:
            return_free_memory()
        self._is_mid_update = False
        if not self.reports or self._dp_rank != 0:
            return None
        moves = self.config.algorithm.old_logprobs == "rollout"  # none from before the update
        combined = combine_optimizer_steps(metrics, sampling_of_first=moves)
        if num_skipped:
            combined["fault/nonfinite_steps"] = float(num_skipped)
        return UpdateOutput(self.policy_version, combined)

    def _optimizer_step(self, step: Step) -> dict[str, float] | None:
        """Forward, backward, clip, AdamW; None if the step is not finite: nothing has changed."""
        metrics, grad_norm, found = self.step_gradients(step)
        if found:
            # Scales that FP8 tensors have from this step are not those of the one before.
            self._unknown_scales = self._unknown_gradient_scales = self._has_scales
            self._gather_weights()
            metrics |= {"grad_norm": grad_norm}
            weights = trained_weights(self.model)
            self.nonfinite.skip(step, found, metrics, weights, write_model=self.write_model)
            return None
        self.nonfinite.num_in_row = 0
        self.scheduler.step(increment=1)
        self._is_mid_update = True
        with out_of_memory_explained(
            "the optimizer's step, the first of which makes its state: "
            f"{self._more_gpus_for_optimizer}"
        ):
            step_prepared(self.optimizer)
        return metrics | {
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def _gather_weights(self) -> None:
        """Have the whole weights on each rank, before anything but a forward pass reads them.

        With overlap_param_gather, an optimizer step leaves new weights in each rank's own part.
        """
        if self._overlaps_param_gather:
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)

    def step_gradients(self, step: Step) -> tuple[dict[str, float], float, dict[str, int]]:
        """Forward and backward pass of an optimizer step: the gradient is ready to be applied.

        Returns:
            metrics (on the last pipeline stage), the norm of the gradient, and what is not finite,
            see `find_nonfinite`.
        """
        batch, rows, algorithm = step.batch, step.rows, self.config.algorithm
        if step.loss is not None:
            algorithm = algorithm.model_copy(update={"loss_type": step.loss})
        weights = loss_weights(
            batch.completion_mask,
            rows=rows,
            kept_N=batch.kept,
            aggregation=algorithm.loss_settings.loss_aggregation,
            max_completion_length=self.config.max_completion_length,
        )
        seed = hash((self.config.seed, step.policy_version, *rows))
        batch = choose_tokens(batch, rows, algorithm, seed=seed)
        # Rows without tokens to train on are skipped, unless a rank would be left with nothing.
        trained = [row for row in rows if batch.completion_mask[row].any()]
        rows = trained if len(trained) >= self._dp_size else rows
        shards = self._shard(rows, batch)
        packed, _ = self._pack(batch, shards, weights)
        # The weights already hold the global denominator. megatron-core's schedule divides by the
        # number of micro-batches and its DDP by the number of replicas: undo both. (DDP averages
        # over context-parallel ranks, too, but the schedule has multiplied by their number.)
        undo_averaging = len(packed) * self._dp_size

        def loss_of(of_tokens: Any, micro_batch: PackedMicroBatch) -> Loss:
            value, statistics = self._loss(of_tokens, micro_batch, batch, algorithm)
            return value * undo_averaging, statistics

        begin = None
        if self.routing is not None:
            begin = partial(
                self.routing.begin_step,
                num_tokens=int(batch.lengths[rows].sum()),
                num_rows=len(rows),
                undo_averaging=undo_averaging,
            )
        if self.adapters is not None:
            self.adapters.seed_dropout(seed)
        outputs = self._compute_gradients(packed, loss_of, begin)
        metrics = {}
        if self.is_last_stage:
            metrics = reduced_means(outputs, parallel_state.get_data_parallel_group())
        if self.routing is not None:
            metrics |= self.routing.metrics()
        self.offload.await_optimizer()
        found_inf = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        found = find_nonfinite(metrics, grad_norm, self.ddp, found_inf=found_inf)
        return metrics, grad_norm, found

    def _loss(
        self,
        of_tokens: Any,
        micro_batch: PackedMicroBatch,
        batch: TrainBatch,
        algorithm: GrpoConfig,
    ) -> Loss:
        """The loss of a micro-batch of `batch`, from what the head computes, and statistics."""
        inputs = LossInput.from_packed(micro_batch, *of_tokens)
        value, statistics = compute_loss(inputs, algorithm)
        statistics |= count_nonfinite(micro_batch, of_tokens.logprobs, value)
        if self.trace is not None:
            self.trace.at_loss(inputs, value, algorithm)
        return value, statistics

    def _compute_gradients(
        self,
        packed: list[PackedMicroBatch],
        loss_of: LossOf,
        begin: Callable[[], None] | None,
    ) -> list[dict[str, torch.Tensor]]:
        """Fill the gradient buffers; `begin` is called before each pass over the micro-batches."""
        # The first passes with delayed scaling are for the scales that they find; see fp8_recipe.
        for _ in range(3 if self._unknown_gradient_scales else 1):
            if begin is not None:
                begin()
            for chunk in self.ddp:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            outputs = self._forward_backward(packed, loss_of, chunks=self.ddp, forward_only=False)
        self._unknown_scales = self._unknown_gradient_scales = False
        return outputs

    def compute_logprobs(
        self, batch: TrainBatch, values: Sequence[str] = LOGPROBS, *, adapter: bool = True
    ) -> tuple[list[int], torch.Tensor] | None:
        """See MegatronModel.compute_logprobs.

        `adapter=False` computes those of the base model, the reference of a run with policy.lora.
        """
        self.offload.check("compute_logprobs")
        if adapter:
            return super().compute_logprobs(batch, values)
        assert self.adapters is not None, "the policy's base is gone"
        with self.adapters.off():
            return super().compute_logprobs(batch, values)

    def save_model(self, folder: Path, write: ModelWriter = save_model_folder) -> None:
        """Write the model, or the adapter in PEFT's format; see MegatronModel.save_model.

        Raises:
            NonFiniteWeights: they hold NaNs or infinities.
        """
        self.offload.check("save_model")
        check_finite(f"the model of version {self.policy_version}", trained_weights(self.model))
        self.write_model(folder, write)

    def write_model(self, folder: Path, write: ModelWriter = save_model_folder) -> None:
        """As `save_model`, whatever the numbers are."""
        if self.adapters is None:
            super().save_model(folder, write)
            return
        is_first = dist.get_rank() == 0
        with replacing_folder(folder) if is_first else nullcontext(folder) as partial:
            self.adapters.stage_files(partial, base_name(self.config, self.folder))()
        dist.barrier()

    def finished_version(self) -> int | None:
        """Number of updates that the weights have had; None if the last one did not end."""
        return None if self._is_mid_update else self.policy_version

    def begin_model(self, folder: Path) -> None:
        """As `save_model`, into an existing folder; `writer` knows when all is on the disk."""
        self.offload.check("begin_model")
        super().begin_model(folder)

    def begin_checkpoint(self, folder: Path) -> None:
        """Start writing the model or its adapter, and the optimizer's state, into an empty folder.

        Every rank calls; `writer` knows when all is on the disk.

        Raises:
            NonFiniteWeights: one of them holds NaNs or infinities.
        """
        self.offload.check("begin_checkpoint", optimizer=True)
        self.offload.await_optimizer()
        held = chain(trained_weights(self.model), optimizer_tensors(self.optimizer))
        check_finite(f"the checkpoint of version {self.policy_version}", held)
        begin_checkpoint(self, folder)

    def load_checkpoint(self, folder: Path) -> int:
        """Continue from a checkpoint, see `check_checkpoint`; returns its policy_version."""
        self.offload.check("load_checkpoint", optimizer=True)
        self.offload.await_optimizer()
        if is_adapter_folder(folder) != (self.adapters is not None):
            found = "an adapter" if self.adapters is None else "all weights"
            raise ValueError(
                f"the checkpoint {folder} holds {found}, and policy.lora says otherwise: continue "
                "with the policy.lora that the run had, or start a new run with --overwrite"
            )
        check_checkpoint(folder)
        (self.weights if self.adapters is None else self.adapters.weights).load(folder)
        self.offload.frozen_weights_changed()
        version = load_optimizer(folder, self.weights, self.optimizer, self.scheduler)
        self.go_on_from(version)
        if self.config.policy.fp8_param_gather:
            # The folder has what FP8 weights stand for, rounded: they come from the float32 copy,
            # as after an optimizer step.
            for one in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
                one._copy_main_params_to_model_params()
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)
        return self.policy_version

    def go_on_from(self, version: int) -> None:
        """Note that weights and optimizer are now those after `version` updates."""
        self.policy_version = version
        self._is_mid_update = False
        # Transformer Engine saves scales as a pickle, which no checkpoint of rlsys holds.
        self._unknown_scales = self._unknown_gradient_scales = self._has_scales
