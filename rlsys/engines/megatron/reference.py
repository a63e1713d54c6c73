"""The frozen reference model on megatron-core, which may wait in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from rlsys.config import Config
from rlsys.engines.megatron.hf_folder import save_model_folder
from rlsys.engines.megatron.model import LOGPROBS, MegatronModel, ModelWriter
from rlsys.engines.out_of_memory import out_of_memory_explained
from rlsys.types import Device, TrainBatch


class MegatronReference(MegatronModel):
    """One rank of the reference.

    If it shares its GPU with a policy rank (reference.placement), its weights are on the GPU only
    while it computes: copying 1.5B parameters in bfloat16 takes a tenth of a second.
    """

    role = "reference"
    config: Config

    def __init__(self, config: Config, *, device: Device):
        super().__init__(config, config.reference_path, device=device)
        self._in_host_memory: dict[torch.nn.Parameter, torch.Tensor] = {}
        if config.reference.placement == "policy" and not self.on_cpu:
            with out_of_memory_explained(
                "the reference's weights, which wait there in pinned pages: set "
                "reference.placement to own",
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
        if self.config.reference.placement == "own":
            return super().more_gpus
        return f"set reference.placement to own, or {super().more_gpus}"

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
        """What a reference goes on from in another process: its weights and buffers."""
        yield from self.model.parameters()
        yield from self.model.buffers()

    @contextmanager
    def _on_gpu(self) -> Iterator[None]:
        try:
            with out_of_memory_explained(
                f"the reference's weights beside what the policy holds: {self.more_gpus}"
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
