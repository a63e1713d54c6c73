"""The reference: the frozen model that the KL term measures from. Exists when beta > 0."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import ray
import torch

from rlsys.actors.group import Place, on_cpu
from rlsys.actors.model_group import ModelActors, ModelRank
from rlsys.actors.policy import PolicyActors
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import Config
from rlsys.types import Device, TrainBatch
from rlsys.weight_sync.connection import Endpoint
from rlsys.weight_sync.receiver import WeightReceiver


class ReferenceRank(ModelRank):
    """One rank of the reference: no optimizer, no gradients."""

    def start(self, address: str, port: int) -> None:
        """Build the model."""
        self.join(
            address,
            port,
            world_size=self.config.reference.world_size,
            tensor_parallel_size=self.config.reference.tensor_parallel_size,
            # What tensor parallelism does for other layers: a share of the experts a rank.
            expert_model_parallel_size=self.config.reference.tensor_parallel_size,
            context_parallel_size=self.config.reference.context_parallel_size,
        )
        from rlsys.engines.megatron.reference import MegatronReference

        self.engine = MegatronReference(self.config, device=self.device)

    def compute_logprobs(self, batch: TrainBatch) -> tuple[list[int], torch.Tensor] | None:
        """See MegatronModel.compute_logprobs."""
        return self.engine.compute_logprobs(batch)

    def connect_weight_sync(self, endpoints: Sequence[Sequence[Endpoint]]) -> None:
        """Connect to the policy."""
        connection, rank = endpoints[self.rank][0]
        self.receiver = WeightReceiver(connection, self.engine.device, rank=rank)

    def update_weights(self, policy_version: int) -> int:
        """Receive the policy's weights and mix them in; returns the version that came."""
        received = [
            bucket.views(buffer)
            for bucket, buffer in self.receiver.receive(policy_version, keep=True)
        ]
        self.receiver.check()
        tensors = chain.from_iterable(received)
        self.engine.mix_weights(tensors, alpha=self.config.reference.mixup_alpha)
        return policy_version

    def save_model(self, folder: Path) -> None:
        """See MegatronModel.save_model."""
        self.engine.save_model(folder)

    def load_model(self, folder: Path) -> None:
        """See MegatronReference.load_model."""
        self.engine.load_model(folder)


class ReferenceActors(ModelActors):
    """The reference as the driver sees it.

    With `follow` it can be given the policy's weights. They travel over gloo through host memory,
    where a reference that shares the policy's GPU keeps its own, and where NCCL, which refuses two
    ranks on one GPU, is not needed: it happens every reference.sync_steps.
    """

    def __init__(self, config: Config, *, device: Device, place: Place = on_cpu):
        self.num_engines = config.reference.world_size
        self.workers_per_engine = self.engines_per_gpu = 1
        self._config = config
        self.refreshed_after: int | None = None
        """The step after which the policy's weights were mixed in last."""
        super().__init__(
            ReferenceRank,
            config,
            device=device,
            role="reference",
            world_size=self.num_engines,
            place=place,
        )

    def follow(self, policy: PolicyActors) -> None:
        """Connect to the policy, for `refresh`."""
        self._policy = policy
        self._publisher = WeightPublisher(
            policy, self, self._config.weight_sync, to="reference", transport="gloo"
        )

    def refresh(self) -> None:
        """Mix the policy's weights in, by reference.mixup_alpha."""
        self._publisher.publish()
        self.refreshed_after = self._policy.policy_version

    def save_model(self, folder: Path) -> None:
        """Write a Hugging Face model folder; whole or not at all."""
        self.call("save_model", folder)

    def load_model(self, folder: Path) -> None:
        """Take the weights of a model folder."""
        self.call("load_model", folder)

    def async_connect_weight_sync(
        self, endpoints: Sequence[Sequence[Endpoint]]
    ) -> dict[str, ray.ObjectRef]:
        """Connect each rank to its endpoint; each counts as an engine with one worker."""
        return self.async_call("connect_weight_sync", endpoints)

    def async_needed_slices(self) -> dict[str, ray.ObjectRef]:
        """Every rank needs whole tensors, see MegatronWeights.mix."""
        return {}

    def async_start_weight_update(self) -> dict[str, ray.ObjectRef]:
        """Nothing runs between two phases."""
        return {}

    def async_update_weights(self, policy_version: int) -> dict[str, ray.ObjectRef]:
        """Receive the policy's weights and mix them in; the results are their versions."""
        return self.async_call("update_weights", policy_version)
