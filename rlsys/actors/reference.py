"""The reference: what GRPO's KL term measures from, and what preference losses compare with.

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
from rlsys.actors.snapshots import Snapshots
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import Config, ReferencedConfig
from rlsys.file_sums import FileSum
from rlsys.problems import RunFailed
from rlsys.types import Device, TrainBatch
from rlsys.weight_sync.connection import Endpoint
from rlsys.weight_sync.receiver import WeightReceiver

if TYPE_CHECKING:
    from rlsys.engines.megatron.reference import MegatronReference
    from rlsys.engines.rank_state import RankState


REFERENCE_FOLDER = "reference"
"""Name of the folder in a checkpoint."""


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
    config: ReferencedConfig

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

    def state(self, version: int) -> RankState:
        """Its weights. See rlsys.engines.megatron.snapshot."""
        from rlsys.engines.megatron.snapshot import take_state

        return take_state(version, self.engine.state_tensors())

    def restore_snapshot(self, state: RankState) -> None:
        """See rlsys.engines.megatron.snapshot."""
        from rlsys.engines.megatron.snapshot import put_state

        put_state(state, self.engine.state_tensors())

    def load_model(self, folder: Path) -> None:
        """See MegatronWeights.load."""
        self.engine.weights.load(folder)


class ReferenceActors(ModelActors):
    """The reference as the driver sees it.

    After `connect_to` it can take the policy's weights. They travel over gloo through host memory:
    a reference that shares the policy's GPU keeps its own weights there, and NCCL refuses two ranks
    on one GPU. It happens only every reference.sync_steps.
    """

    config: ReferencedConfig

    def __init__(
        self,
        config: ReferencedConfig,
        *,
        device: Device,
        place: PlaceActor = on_cpu,
        policy: PolicyActors | None = None,
        rank_class: type[ReferenceRank] = ReferenceRank,
    ):
        self.num_engines = config.reference.world_size
        self.workers_per_engine = 1
        self.senders = [0]
        """The policy rank that sends in each weight sync connection: all ranks share one."""
        self.synced_after: int | None = None
        self._policy = policy
        self._publisher: WeightPublisher | None = None
        self._may_have_mixed = False
        """Whether a sync has begun that has not ended."""
        self._changed_at: int | None = None
        """The policy's version when weights were last mixed in or loaded; None: never."""
        super().__init__(
            "reference",
            rank_class,
            config,
            device=device,
            world_size=self.num_engines,
            place=place,
        )
        self.snapshots = Snapshots(1 if config.policy.snapshot_steps else 0)  # of each change

    def connect_to(self, policy: PolicyActors) -> None:
        """Connect to the policy, for `sync`."""
        self._policy = policy
        assert isinstance(self.config, Config), "no other method syncs it"
        self._publisher = WeightPublisher(
            policy, self, self.config.weight_sync, to="reference", transport="gloo"
        )

    def sync(self) -> None:
        """Mix the policy's weights in, by reference.mixup_alpha."""
        self.healed("sync", self._sync)

    def _sync(self) -> None:
        assert self._policy is not None
        assert self._publisher is not None
        self.settle_snapshots()
        self.turns.take_for_policy()
        self._publisher.publish()
        self._may_have_mixed = False
        self.synced_after = self._policy.policy_version
        self._changed()

    def _changed(self) -> None:
        """Keep the new weights for a restart."""
        self._changed_at = 0 if self._policy is None else self._policy.policy_version
        if self.heals:
            self.begin_snapshot(self._changed_at)

    def take_in(self, *, timeout_s: float) -> bool:
        """See ActorGroup. Before a sync that is done again all ranks start again.

        Some may have mixed in the weights that were sent, which others have not got.
        """
        again = self._may_have_mixed
        if again:
            self.start_again()
        self._may_have_mixed = True
        return again

    @property
    def step(self) -> int:
        """See ModelActors."""
        return 0 if self._policy is None else self._policy.step

    def take_gpus(self) -> None:
        """See ModelActors."""
        self.turns.take_for_policy()

    def go_back(self) -> None:
        """See ModelActors: to the weights after the last sync."""
        if self._publisher is not None:
            self._publisher.forget_connection()
        self._may_have_mixed = False
        if self._changed_at is None:
            return  # they are those of the model's folder
        newest = self.snapshots.newest
        if newest is not None and newest.version == self._changed_at:
            self.restore(newest)
            return
        for step, folder in self.checkpoints():
            if step >= self._changed_at and (folder / REFERENCE_FOLDER).exists():
                self.call("load_model", folder / REFERENCE_FOLDER)
                return
        raise RunFailed(
            f"the reference cannot go back to its weights of step {self._changed_at} after a "
            "restart: there is neither a snapshot nor a checkpoint of them. Set "
            "policy.snapshot_steps to auto, or checkpoint.save_steps"
        )

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
            self._changed()


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
