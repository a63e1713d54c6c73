"""The reference: the frozen model that the KL term measures from. Exists when beta > 0."""

from __future__ import annotations

import torch

from rlsys.actors.group import Place, on_cpu
from rlsys.actors.model_group import ModelActors, ModelRank
from rlsys.config import Config
from rlsys.types import TrainBatch


class ReferenceRank(ModelRank):
    """One rank of the reference: no optimizer, no gradients."""

    def start(self, address: str, port: int) -> None:
        """Build the model."""
        self.join(
            address,
            port,
            world_size=self.config.reference.world_size,
            tensor_parallel_size=self.config.reference.tensor_parallel_size,
        )
        from rlsys.engines.megatron_reference import MegatronReference

        self.engine = MegatronReference(self.config)

    def compute_logprobs(self, batch: TrainBatch) -> tuple[list[int], torch.Tensor] | None:
        """See MegatronModel.compute_logprobs."""
        return self.engine.compute_logprobs(batch)


class ReferenceActors(ModelActors):
    """The reference as the driver sees it."""

    def __init__(self, config: Config, *, place: Place = on_cpu):
        world_size = config.reference.world_size
        super().__init__(
            ReferenceRank, config, role="reference", world_size=world_size, place=place
        )
