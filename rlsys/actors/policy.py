"""The policy: a group of actors, each one rank of the trained model."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from rlsys.actors.group import PlaceActor, on_cpu
from rlsys.actors.model_group import ModelActors, ModelRank
from rlsys.actors.recovery import FailsAgain
from rlsys.actors.rollback import dump_update, update_from_good_state
from rlsys.config import RunConfig
from rlsys.engines.out_of_memory import out_of_memory_explained
from rlsys.engines.rank_state import RankState
from rlsys.file_sums import FileSum
from rlsys.plugins.load import load_plugins
from rlsys.problems import NonFiniteWeights, RunFailed
from rlsys.types import Device, TrainBatch, UpdateOutput
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import TensorMeta
from rlsys.weight_sync.sender import WeightSender, sending_memory
from rlsys.weight_sync.transport import WeightSyncError

if TYPE_CHECKING:
    from rlsys.actors.weight_publisher import WeightPublisher
    from rlsys.engines.megatron.export import BucketExport
    from rlsys.engines.megatron.policy import MegatronPolicy
    from rlsys.engines.megatron.stream_export import StreamExport

UPDATES_KEPT = 32
"""Updates whose batches the driver keeps at least, so that they can be done again: as many steps a
checkpoint may be old that ranks go back to without a snapshot."""


@dataclass(frozen=True, slots=True)
class WeightLink:
    """A policy rank's part in one weight sync connection."""

    export: BucketExport | StreamExport
    sender: WeightSender | None
    """None on ranks that only contribute to what another rank sends."""

    def send(self, version: int) -> float:
        """See WeightSender.send; 0 on ranks that contribute."""
        if self.sender is not None:
            return self.sender.send(self.export.fill, version)
        self.export.contribute()
        return 0.0

    def nonfinite(self) -> list[str]:
        """See WeightSender.nonfinite; [] on ranks that contribute."""
        return [] if self.sender is None else self.sender.nonfinite()


class PolicyRank(ModelRank):
    """One rank of the policy."""

    engine: MegatronPolicy

    def start(self, address: str, port: int) -> None:
        """Build model and optimizer."""
        policy = self.config.policy
        self.join(
            address,
            port,
            world_size=policy.world_size,
            tensor_parallel_size=policy.tensor_parallel_size,
            pipeline_parallel_size=policy.pipeline_parallel_size,
            virtual_pipeline_size=policy.virtual_pipeline_size,
            expert_model_parallel_size=policy.expert_model_parallel_size,
            context_parallel_size=policy.context_parallel_size,
        )
        load_plugins(self.config.loss_plugins)
        self.engine = self.build()
        self.links: dict[str, list[WeightLink]] = {}

    def build(self) -> MegatronPolicy:
        """Build the engine; megatron-core is initialised."""
        from rlsys.engines.megatron.policy import MegatronPolicy

        return MegatronPolicy(self.config, device=self.device)

    def weight_metadata(self) -> list[TensorMeta]:
        """See MegatronWeights.metadata."""
        return self.engine.weights.metadata()

    def adapter_metadata(self) -> list[TensorMeta]:
        """The same of the LoRA adapter, under PEFT's names."""
        assert self.engine.adapters is not None
        return self.engine.adapters.weights.metadata()

    def update(self, batch: TrainBatch, loss: str | None) -> UpdateOutput | None:
        """See MegatronPolicy.update."""
        return self.engine.update(batch, loss=loss)

    def compute_base_logprobs(self, batch: TrainBatch) -> tuple[list[int], torch.Tensor] | None:
        """See MegatronPolicy.compute_logprobs: of the base, with the LoRA adapter off."""
        return self.engine.compute_logprobs(batch, adapter=False)

    def peak_memory_gib(self) -> float:
        """Peak memory reserved on this rank's GPU; on CPU, the peak of its process."""
        if not self.engine.on_cpu:
            return torch.cuda.max_memory_reserved() / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB here

    def connect_weight_sync(self, connections: Sequence[Connection], *, to: str) -> None:
        """Plan this rank's part, and become rank 0 of the connections that it sends.

        `to` names the receivers; these connections replace the earlier ones to the same receivers.
        """
        self.engine.offload.check("connect_weight_sync")
        links = self.links[to] = []
        exports: dict[Any, Any] = {}
        mib = max(bucket.nbytes for c in connections for bucket in c.buckets()) / 2**20
        with out_of_memory_explained(
            f"two buckets of {mib:,.0f} MiB to send weights in: lower weight_sync.bucket_mb"
        ):
            own = [connection for connection in connections if connection.sender == self.rank]
            memory = sending_memory(own, self.engine.device) if own else None
            for connection in connections:
                is_sender = connection.sender == self.rank
                export = exports.get((connection.sender, connection.slices))
                if export is None:  # engines that share a GPU get the same slices, in turn
                    export = self.engine.export_to(connection)
                    exports[connection.sender, connection.slices] = export
                sender = WeightSender(connection, self.engine.device, memory) if is_sender else None
                links.append(WeightLink(export, sender))

    def send_weights(self, version: int, *, to: str) -> float:
        """Take part in exporting and sending; returns the seconds of this rank's transports.

        What `offload_optimizer` has begun meanwhile is done at the end.

        Raises:
            WeightSyncError: a receiver did not take part in time, or is gone.
            NonFiniteWeights: what was sent holds NaNs or infinities.
        """
        self.engine.offload.check("send_weights")
        seconds, failures = 0.0, []
        for link in self.links[to]:
            try:
                seconds += link.send(version)
            except WeightSyncError as error:  # other ranks need this one for the next link
                failures.append(error)
        self.engine.offload.finish()
        if failures:
            raise failures[0]
        # Only now: receivers of other connections wait for their weights, too.
        if names := [name for link in self.links[to] for name in link.nonfinite()]:
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            raise NonFiniteWeights(
                f"the weights of policy version {version} hold NaNs or infinities, so nothing may "
                f"sample with them: in or beside {', '.join(names[:3])}{more}"
            )
        return seconds

    def drop_gradients(self) -> None:
        """Free the memory of gradients until `onload`."""
        self.engine.offload.drop_gradients()

    def offload_optimizer(self) -> None:
        """See Offload.offload_optimizer; `send_weights` or `offload_weights` awaits it."""
        self.engine.offload.offload_optimizer()

    def offload_weights(self) -> None:
        """See Offload.offload_weights; no effect unless `weights_leave`."""
        if self.engine.weights_leave:
            self.engine.offload.offload_weights()

    def onload(self) -> None:
        """See Offload.onload."""
        self.engine.offload.onload()

    def finished_version(self) -> int | None:
        """See MegatronPolicy.finished_version."""
        return self.engine.finished_version()

    def continue_as(self, version: int) -> None:
        """Call the present state a version."""
        self.engine.policy_version = version

    def has_finite_weights(self) -> bool:
        """Whether no rank trains a NaN or an infinity; every rank calls."""
        from rlsys.engines.megatron.nonfinite import nonfinite_by_rank
        from rlsys.engines.megatron.trained import trained_weights

        return not nonfinite_by_rank(trained_weights(self.engine.model))

    def state(self, version: int) -> RankState:
        """See rlsys.engines.megatron.snapshot."""
        from rlsys.engines.megatron.snapshot import take_snapshot

        assert self.engine.policy_version == version
        return take_snapshot(self.engine)

    def restore_snapshot(self, state: RankState) -> None:
        """See rlsys.engines.megatron.snapshot."""
        from rlsys.engines.megatron.snapshot import restore_snapshot

        restore_snapshot(self.engine, state)

    def begin_checkpoint(self, folder: Path) -> None:
        """See MegatronPolicy.begin_checkpoint."""
        self.engine.begin_checkpoint(folder)

    def load_checkpoint(self, folder: Path) -> int:
        """See MegatronPolicy.load_checkpoint."""
        return self.engine.load_checkpoint(folder)


@dataclass(frozen=True, slots=True)
class _Update:
    """An update that can be done again."""

    version: int
    """Which it made."""
    batch: ray.ObjectRef
    loss: str | None


class PolicyActors(ModelActors):
    """The policy as the driver sees it.

    Args:
        config, device, place: see `ModelActors`.
        rank_class: class of the actors; tests and benchmarks add methods to it.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        device: Device,
        place: PlaceActor = on_cpu,
        rank_class: type[PolicyRank] = PolicyRank,
    ):
        size = config.policy.world_size
        super().__init__("policy", rank_class, config, device=device, world_size=size, place=place)
        self.policy_version = 0
        """Completed updates: the version of the weights that the next publish sends."""
        self.publishers: list[WeightPublisher] = []
        """Those that send this policy's weights; they register themselves."""
        self._updates: list[_Update] = []
        """The newest ones, from which `go_back` comes forward again."""
        self._origin: tuple[int, Callable[[], object]] | None = (0, lambda: None)
        """The version from which `_updates` go on, and what gives ranks its state; None if only a
        checkpoint does. Older states do not lead to this version."""

    def update(self, batch: TrainBatch, *, loss: str | None = None) -> UpdateOutput:
        """Take all optimizer steps of one rollout on `batch`; raises policy_version by one.

        `loss` is the name of a registered loss; None is the config's.
        """
        stored = ray.put(batch)
        update = partial(self._update, stored, loss)
        try:
            output = update()
            if output.rolls_back is not None:
                output = update_from_good_state(self, update, output.rolls_back)
        except FailsAgain as error:
            raise RunFailed(f"{error}\n{dump_update(self, batch, loss, str(error))}") from error
        self.policy_version = output.policy_version
        if self.heals:
            newest = self.snapshots.newest
            since = 0 if newest is None else output.policy_version - newest.version
            self._updates.append(_Update(output.policy_version, stored, loss))
            self._updates = self._updates[-max(since, UPDATES_KEPT) :]
            self.begin_snapshot(self.policy_version)
        return output

    def _update(self, batch: ray.ObjectRef, loss: str | None) -> UpdateOutput:
        outputs = self.call_in_turn("update", batch, loss)
        return next(output for output in outputs if output is not None)

    def continue_from(self, restore: Callable[[], object]) -> None:
        """Give the ranks an older state under the number of the present version.

        Ranks that are restarted before there is a newer state come back to it, too.

        Args:
            restore: gives it to them.
        """
        self.turns.take_for_policy()
        version = self.policy_version

        def again() -> None:
            restore()
            self.call("continue_as", version)

        self.healed("rollback", again)
        self._origin = version, again
        self._updates = []  # they do not lead from an earlier state to this one

    @property
    def step(self) -> int:
        """See ModelActors: the update that comes next."""
        return self.policy_version + 1

    def take_gpus(self) -> None:
        """See ModelActors."""
        self.turns.free_for_policy()

    def go_back(self) -> None:
        """See ModelActors: to the newest of all states from which updates lead to this version."""
        for version, restore in self._states():
            updates = [one for one in self._updates if one.version > version]
            if len(updates) == self.policy_version - version:
                restore()
                for one in updates:
                    self.call("update", one.batch, one.loss)
                assert set(self.call("finished_version")) == {self.policy_version}
                for publisher in self.publishers:
                    publisher.forget_connection()
                return
        raise RunFailed(
            f"the policy cannot go back to version {self.policy_version} after a restart. There is "
            f"no snapshot, and no checkpoint of the last {UPDATES_KEPT} steps: set "
            "policy.snapshot_steps to auto, or lower checkpoint.save_steps"
        )

    def _states(self) -> Iterator[tuple[int, Callable[[], object]]]:
        """Version and restoring function of each state to go back to, newest first."""
        origin = -1 if self._origin is None else self._origin[0]
        if (newest := self.snapshots.newest) is not None and newest.version > origin:
            yield newest.version, partial(self.restore, newest)
        for step, folder in self.checkpoints():
            if step > origin:
                yield step, partial(self.call, "load_checkpoint", folder)
        if self._origin is not None:
            yield self._origin

    def compute_base_logprobs(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `compute_logprobs`, of the base: the policy with its LoRA adapter off."""
        return self._gather_logprobs("compute_base_logprobs", batch)

    def peak_memory_gib(self) -> float:
        """The largest PolicyRank.peak_memory_gib."""
        return max(self.healed("peak_memory_gib", partial(self.call, "peak_memory_gib")))

    def weight_metadata(self) -> list[TensorMeta]:
        """Every tensor that a weight sync sends, in its order."""
        return self.call("weight_metadata")[0]

    def adapter_metadata(self) -> list[TensorMeta]:
        """Every tensor of the LoRA adapter, under PEFT's names."""
        return self.call("adapter_metadata")[0]

    def finished_version(self) -> int | None:
        """Number of updates in the weights, once all ranks have finished their calls.

        None in the middle of an update, or where ranks may be stuck in a collective.
        """
        if self.may_be_stuck:
            return None
        versions = set(self.call("finished_version"))
        return versions.pop() if len(versions) == 1 else None

    def begin_checkpoint(self, folder: Path) -> Callable[[], dict[str, FileSum]]:
        """Copy everything that is needed to continue exactly, and start writing it.

        Returns:
            what waits until it is on the disk, see `files_from`.
        """
        return self.files_from("begin_checkpoint", folder)

    def save_checkpoint(self, folder: Path) -> None:
        """`begin_checkpoint`, and wait."""
        self.begin_checkpoint(folder)()

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        self.policy_version = self.call_in_turn("load_checkpoint", folder)[0]
        self._origin = None
