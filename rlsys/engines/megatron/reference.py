"""The frozen models on megatron-core, reference and teacher, which may wait in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from rlsys.algo.batching import PackedMicroBatch
from rlsys.algo.teacher_rows import split_rows
from rlsys.config import ReferencedConfig, RunConfig
from rlsys.engines.megatron.build import LogprobHead
from rlsys.engines.megatron.divergence_head import TeacherHead, TeacherValues
from rlsys.engines.megatron.hf_folder import save_model_folder
from rlsys.engines.megatron.model import LOGPROBS, MegatronModel, ModelWriter
from rlsys.engines.out_of_memory import out_of_memory_explained
from rlsys.types import Device, TeacherRows, TrainBatch


class FrozenModel(MegatronModel):
    """One rank of a model that is not trained.

    If it shares its GPU with a policy rank, its weights are on the GPU only while it computes:
    copying 1.5B parameters in bfloat16 takes a tenth of a second.

    Args:
        config: of the run.
        path: the model's folder or hub id.
        placement: the field of the role's section.
        device: of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        path: str,
        placement: Literal["policy", "own"],
        *,
        device: Device,
    ):
        self._placement = placement
        super().__init__(config, path, device=device)
        self._in_host_memory: dict[torch.nn.Parameter, torch.Tensor] = {}
        if placement == "policy" and not self.on_cpu:
            with out_of_memory_explained(
                f"the {self.role}'s weights, which wait there in pinned pages: set "
                f"{self.role}.placement to own",
                memory="Host memory",
            ):
                self._in_host_memory = {
                    parameter: parameter.data.to("cpu").pin_memory()
                    for parameter in self.model.parameters()
                }
            self._leave_gpu()

    @property
    def more_gpus(self) -> str:
        """Remedy for a model that is too large for a GPU."""
        if self._placement == "own":
            return super().more_gpus
        return f"set {self.role}.placement to own, or {super().more_gpus}"

    def compute_logprobs(
        self, batch: TrainBatch, values: Sequence[str] = LOGPROBS
    ) -> tuple[list[int], torch.Tensor] | None:
        """See MegatronModel.compute_logprobs."""
        with self._on_gpu():
            return super().compute_logprobs(batch, values)

    def save_model(self, folder: Path, write: ModelWriter = save_model_folder) -> None:
        """See MegatronModel.save_model."""
        with self._on_gpu():  # where its ranks can exchange weights
            super().save_model(folder, write)

    def state_tensors(self) -> Iterator[torch.Tensor]:
        """What it goes on from in another process: its weights and buffers."""
        yield from self.model.parameters()
        yield from self.model.buffers()

    @contextmanager
    def _on_gpu(self) -> Iterator[None]:
        try:
            with out_of_memory_explained(
                f"the {self.role}'s weights beside what the policy holds: {self.more_gpus}"
            ):
                for parameter, waiting in self._in_host_memory.items():
                    parameter.data = waiting.to(self.device, non_blocking=True)
            yield
        finally:
            if self._in_host_memory:
                self._leave_gpu()

    def _leave_gpu(self) -> None:
        for parameter, waiting in self._in_host_memory.items():
            parameter.data = waiting
        torch.cuda.empty_cache()  # the policy cannot use what the allocator keeps


class MegatronReference(FrozenModel):
    """One rank of the reference of the KL term."""

    role = "reference"

    def __init__(self, config: ReferencedConfig, *, device: Device):
        super().__init__(config, config.reference_path, config.reference.placement, device=device)


class MegatronTeacher(FrozenModel):
    """One rank of the model that the policy learns from."""

    role = "teacher"

    def __init__(self, config: RunConfig, *, device: Device):
        teacher = config.used_teacher
        assert teacher is not None
        assert teacher.path is not None
        super().__init__(config, teacher.path, teacher.placement, device=device)
        self._logprob_head = self._head
        self._teacher_head = None
        if config.divergence is not None:
            assert isinstance(self._head, LogprobHead), "a teacher has one pipeline stage"
            self._teacher_head = TeacherHead(self._head, config)

    @torch.no_grad()
    def describe_tokens(self, batch: TrainBatch) -> tuple[list[int], TeacherRows] | None:
        """What the divergence needs of each token that is trained on.

        Returns:
            row indices of this data-parallel rank and what it found of them; None on ranks that do
            not report.
        """
        shards = self._shard(range(len(batch.lengths)), batch)
        packed, row_lists = self._pack(batch, shards, torch.zeros(batch.input_ids.shape))

        def collect(
            values: TeacherValues, micro_batch: PackedMicroBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            known = {name: v for name, v in values._asdict().items() if v is not None}
            kept = {name: v[micro_batch.loss_mask].cpu() for name, v in known.items()}
            return torch.zeros((), device=self.device), kept

        self._head = self._teacher_head
        try:
            with self._on_gpu():
                found = self._forward_only(packed, collect)
        finally:
            self._head = self._logprob_head
        if not self.reports:
            return None
        rows = [row for rows in row_lists for row in rows]
        return rows, split_rows(found, batch, rows)
