"""The reference: what the KL term measures from, if beta > 0.

It is a frozen model with actors of its own, or the base of a policy with LoRA, on the policy's
actors. The driver sees a `Reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from rlsys.actors.group import PlaceActor, on_cpu
from rlsys.actors.model_group import ModelActors, ModelRank
from rlsys.actors.policy import PolicyActors
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import Config
from rlsys.file_sums import FileSum
from rlsys.types import Device, TrainBatch
from rlsys.weight_sync.connection import Endpoint
from rlsys.weight_sync.receiver import WeightReceiver

if TYPE_CHECKING:
    from rlsys.engines.megatron.reference import MegatronReference


class Reference(Protocol):
    """The driver's view of a reference."""

    synced_after: int | None
    """The step after which the policy's weights were mixed in last."""

    def compute_logprobs(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See ModelActors.compute_logprobs."""

    def sync(self) -> None:
        """Mix the policy's weights in, by reference.mixup_alpha."""

    def begin_state(self, folder: Path) -> Callable[[], dict[str, FileSum]]:
        """Start writing what has changed since the start of the run; no folder if nothing changes.

        Returns:
            what waits until it is on the disk, see `ModelActors.files_from`.
        """

    def load_state(self, folder: Path) -> None:
        """Take what `begin_state` wrote, if there is such a folder."""


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
        self.workers_per_engine = 1
        self.senders = [0]
        """The policy rank that sends in each weight sync connection: all ranks share one."""
        self.synced_after: int | None = None
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
        self.turns.take_for_policy()
        self._publisher.publish()
        self.synced_after = self._policy.policy_version

    def begin_state(self, folder: Path) -> Callable[[], dict[str, FileSum]]:
        """See Reference."""
        if self.config.reference.sync_steps is None:
            return dict
        folder.mkdir()
        return self.files_from("begin_model", folder)

    def load_state(self, folder: Path) -> None:
        """See Reference."""
        if folder.exists():
            self.call_in_turn("load_model", folder)


class PolicyBase:
    """The reference of a policy with LoRA: the policy's own actors, with the adapter off.

    It costs no memory, and never changes: reference.sync_steps is refused.
    """

    synced_after: int | None = None

    def __init__(self, policy: PolicyActors):
        self._policy = policy

    def compute_logprobs(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See Reference."""
        return self._policy.compute_base_logprobs(batch)

    def sync(self) -> None:
        """See Reference."""
        raise AssertionError("the base of a policy with LoRA takes no weights")

    def begin_state(self, folder: Path) -> Callable[[], dict[str, FileSum]]:
        """See Reference."""
        return dict

    def load_state(self, folder: Path) -> None:
        """See Reference."""
