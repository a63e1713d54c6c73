"""The reference: the frozen model that the KL term measures from. Exists when beta > 0."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.actors.group import PlaceActor, on_cpu
from rlsys.actors.model_group import ModelActors, ModelRank
from rlsys.actors.policy import PolicyActors
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import Config
from rlsys.types import Device
from rlsys.weight_sync.connection import Endpoint
from rlsys.weight_sync.receiver import WeightReceiver

if TYPE_CHECKING:
    from rlsys.engines.megatron.reference import MegatronReference


class ReferenceRank(ModelRank):
    """One rank of the reference: no optimizer, no gradients."""

    engine: MegatronReference
    config: Config

    def start(self, address: str, port: int) -> None:
        """Build the model."""
        reference = self.config.reference
        self.join(
            address,
            port,
            world_size=reference.world_size,
            tensor_parallel_size=reference.tensor_parallel_size,
            # Experts are shared as tensor parallelism shares other layers.
            expert_model_parallel_size=reference.tensor_parallel_size,
            context_parallel_size=reference.context_parallel_size,
        )
        from rlsys.engines.megatron.reference import MegatronReference

        self.engine = MegatronReference(self.config, device=self.device)

    def connect_weight_sync(self, endpoints: Sequence[Sequence[Endpoint]]) -> None:
        """Connect to the policy; each rank counts as an engine with one worker."""
        connection, rank = endpoints[self.rank][0]
        self.receiver = WeightReceiver(connection, self.engine.device, rank=rank)

    def needed_slices(self) -> list[None]:
        """A rank needs whole tensors, see MegatronWeights.mix."""
        return [None]

    def start_weight_update(self) -> None:
        """Nothing has to pause."""

    def update_weights(self, policy_version: int) -> int:
        """Receive the policy's weights and mix them in; returns the version that came."""
        received = [
            bucket.views(buffer)
            for bucket, buffer in self.receiver.receive(policy_version, keep=True)
        ]
        self.receiver.check()
        tensors = chain.from_iterable(received)
        self.engine.weights.mix(tensors, alpha=self.config.reference.mixup_alpha)
        return policy_version

    def load_model(self, folder: Path) -> None:
        """See MegatronWeights.load."""
        self.engine.weights.load(folder)


class ReferenceActors(ModelActors):
    """The reference as the driver sees it.

    After `connect_to` it can take the policy's weights. They travel over gloo through host memory:
    a reference that shares the policy's GPU keeps its own weights there, and NCCL refuses two ranks
    on one GPU. It happens only every reference.sync_steps.
    """

    config: Config

    def __init__(self, config: Config, *, device: Device, place: PlaceActor = on_cpu):
        self.num_engines = config.reference.world_size
        self.workers_per_engine = self.engines_per_gpu = 1
        self.synced_after: int | None = None
        """The step after which the policy's weights were mixed in last."""
        super().__init__(
            "reference",
            ReferenceRank,
            config,
            device=device,
            world_size=self.num_engines,
            place=place,
        )

    def connect_to(self, policy: PolicyActors) -> None:
        """Connect to the policy, for `sync`."""
        self._policy = policy
        self._publisher = WeightPublisher(
            policy, self, self.config.weight_sync, to="reference", transport="gloo"
        )

    def sync(self) -> None:
        """Mix the policy's weights in, by reference.mixup_alpha."""
        self._publisher.publish()
        self.synced_after = self._policy.policy_version

    def load_model(self, folder: Path) -> None:
        """Take the weights of a model folder."""
        self.call("load_model", folder)
