"""Ranks that share one megatron-core model: what the policy and the reference have in common."""

from __future__ import annotations

import gc
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ray
import torch
import torch.distributed as dist

from rlsys.actors.group import START_TIMEOUT_S, ActorGroup, PlaceActor, device_env
from rlsys.actors.heartbeat import HEARTBEAT, Alive
from rlsys.actors.meeting import meeting_address
from rlsys.actors.process import begin_process, inherited_env, rank_env
from rlsys.actors.snapshots import SNAPSHOTS, Report, Snapshot, SnapshotLost, Snapshots
from rlsys.actors.turns import Turns
from rlsys.actors.waiting import ActorDeath, ActorFailure, PhaseTimeout, get_all
from rlsys.config import RunConfig
from rlsys.file_sums import FileSum
from rlsys.files import remove
from rlsys.leftovers import guard_actor
from rlsys.network import gloo_interfaces
from rlsys.types import Device, TrainBatch
from rlsys.weight_sync.transport import serve_store

if TYPE_CHECKING:
    from rlsys.actors.group import Refs
    from rlsys.engines.megatron.model import MegatronModel
    from rlsys.engines.profiling import TorchTrace, Traced
    from rlsys.engines.rank_state import RankState

T = TypeVar("T")

POLL_S = 0.1
"""Seconds between two questions to ranks that are writing."""


class ModelRank(Alive, ABC):
    """Base of the actors that hold one rank of a model, each in its own process."""

    concurrency_groups = (HEARTBEAT, SNAPSHOTS)

    engine: MegatronModel
    _trace: TorchTrace | None = None
    """What is recorded now, see rlsys.actors.profile."""

    def __init__(self, config: RunConfig, device: Device, rank: int):
        begin_process()
        guard_actor()
        self.config = config
        self.device: Device = device
        self.rank = rank

    def rendezvous(self) -> tuple[str, int]:
        """Serve the store at which the ranks meet; returns its address and port.

        The store binds its port now: a port that is merely free may be in use seconds later,
        when megatron-core has been imported.
        """
        address = meeting_address()
        self.store = serve_store(address, self.config.policy.timeout_s, self.config.store_ports)
        return address, self.store.port

    def join(self, address: str, port: int, **sizes: int) -> None:
        """Become a megatron-core rank; the first method that imports megatron.

        Args:
            address, port: the store of `rendezvous`.
            sizes: fields of `ParallelLayout`.
        """
        from rlsys.engines.megatron.on_cpu import enable_megatron_on_cpu, quiet_megatron

        quiet_megatron()
        torch.set_num_threads(self.config.policy.num_cpu_threads)
        if self.device == "cpu":
            enable_megatron_on_cpu()
        from rlsys.engines.megatron.parallel import ParallelLayout, initialize_parallel

        timeout_s = self.config.policy.timeout_s
        # torch asks this variable for every gloo group, and megatron-core makes several.
        os.environ["GLOO_SOCKET_IFNAME"] = ",".join(gloo_interfaces(address))
        if self.rank != 0:
            self.store = dist.TCPStore(
                address, port, is_master=False, timeout=timedelta(seconds=timeout_s)
            )
        layout = ParallelLayout(rank=self.rank, timeout_s=timeout_s, **sizes)
        initialize_parallel(layout, self.store, device=self.device, seed=self.config.seed)
        gc.freeze()  # megatron-core collects garbage in checkpoints: 0.25 s with all imports

    def compute_logprobs(self, batch: TrainBatch) -> tuple[list[int], torch.Tensor] | None:
        """See MegatronModel.compute_logprobs."""
        return self.engine.compute_logprobs(batch)

    def compute_predictions(self, batch: TrainBatch) -> tuple[list[int], torch.Tensor] | None:
        """See ModelActors.compute_predictions."""
        return self.engine.compute_logprobs(batch, ("logprobs", "is_likeliest"))

    def start_trace(self, operations: bool, memory: bool) -> None:
        """See TorchTrace."""
        from rlsys.engines.profiling import TorchTrace

        self._trace = TorchTrace(operations=operations, memory=memory, device=self.device)

    def stop_trace(self, folder: Path, member: str) -> list[Traced]:
        """See TorchTrace; nothing if it was not started, because this rank replaces another."""
        trace, self._trace = self._trace, None
        return [] if trace is None else [trace.stop(folder, f"{member}-{self.rank}")]

    def save_model(self, folder: Path) -> None:
        """See MegatronModel.save_model."""
        self.engine.save_model(folder)

    def begin_model(self, folder: Path) -> None:
        """See MegatronModel.begin_model."""
        self.engine.begin_model(folder)

    def sums_of_files(self, folder: Path) -> dict[str, FileSum] | None:
        """See BackgroundWriter.sums."""
        return self.engine.writer.sums(folder)

    @ray.method(num_returns=2, concurrency_group=SNAPSHOTS)
    def take_snapshot(self, version: int) -> tuple[RankState, Report]:
        """The state of this rank, whose memory Ray copies when this returns.

        It has a thread of its own, so the rank may send weights meanwhile, but not change them.
        """
        from rlsys.engines.megatron.nonfinite import all_finite

        start = time.monotonic()
        state = self.state(version)
        is_finite = all_finite(parameter.detach() for parameter in self.engine.model.parameters())
        node = ray.get_runtime_context().get_node_id()
        return state, Report(state.num_bytes, node, is_finite, time.monotonic() - start)

    @abstractmethod
    def state(self, version: int) -> RankState:
        """What this rank goes on from in another process, after that many updates."""

    @abstractmethod
    def restore_snapshot(self, state: RankState) -> None:
        """Go on from a state that a rank of the same place took."""


class ModelActors(ActorGroup, ABC):
    """The ranks of one model as the driver sees them.

    Args:
        role: "policy", "reference" or "teacher", as errors name it.
        rank_class: class of the actors.
        config: the run's config.
        device: the run's device.
        world_size: number of ranks.
        place: where each rank runs.

    If `restarts` allows it, a rank that dies or hangs costs time only: all ranks are ended and
    started again, since none can work without the others, `go_back` to where they were, and do the
    call again that failed. The same work on the same state gives the same bits.
    """

    turns: Turns = Turns()
    """Taken before every call that needs the GPUs."""
    checkpoints: Callable[[], Iterable[tuple[int, Path]]] = staticmethod(lambda: ())
    """The run's whole checkpoints, (step, folder), newest first: to go back to without snapshot."""

    def __init__(
        self,
        role: Literal["policy", "reference", "teacher"],
        rank_class: type[ModelRank],
        config: RunConfig,
        *,
        device: Device,
        world_size: int,
        place: PlaceActor,
    ):
        self.config = config
        self.timeline_role = role
        self.may_be_stuck = False
        """Whether a rank did not answer, or failed while others may wait for it in a collective."""
        self.snapshots = Snapshots(config.policy.snapshot_steps)
        super().__init__(
            role,
            f"{role} rank",
            rank_class,
            config,
            device,
            size=world_size,
            env=inherited_env()
            | device_env(device)
            | rank_env(device, config.policy.num_cpu_threads),
            place=place,
            timeout_s=config.policy.timeout_s,
        )

    def async_start(self) -> Refs:
        """Have the ranks meet at rank 0; each is ready when its model is built."""
        name, actor = next(iter(self.actors.items()))
        phase = f"start of the {self.role}"
        refs = {name: actor.rendezvous.remote()}
        ((address, port),) = get_all(refs, phase=phase, timeout_s=self.timeout_s)
        return self.async_call("start", address, port)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Run `method` on every rank and return the results in rank order."""
        try:
            return super().call(method, *args)
        except PhaseTimeout:
            self.may_be_stuck = True
            raise
        except ActorFailure:
            self.may_be_stuck |= len(self.actors) > 1
            raise

    def call_in_turn(self, method: str, *args: Any) -> list[Any]:
        """`call`, once it is the policy's turn on the GPUs; see `healed`."""
        return self.healed(method, partial(self.call_once, method, *args))

    def call_once(self, method: str, *args: Any) -> list[Any]:
        """`call_in_turn` that fails when a rank does."""
        self.settle_snapshots()
        self.turns.take_for_policy()
        return self.call(method, *args)

    def settle_snapshots(self) -> None:
        """Return when no rank takes a snapshot."""
        with self.timeline.doing(self.actors, self.timeline_role, "snapshot"):
            self.snapshots.settle(timeout_s=self.timeout_s)

    def healed(self, phase: str, work: Callable[[], T]) -> T:
        """What `work` returns, which is done again after each restart of ranks that failed in it.

        Args:
            phase: what it does, for messages.
            work: may be done again from its beginning.

        Raises:
            ActorDeath, PhaseTimeout: others failed, or nothing is restarted.
            RunFailed: ranks fail too often, or twice in the same place.
        """
        while True:
            try:
                return work()
            except (ActorDeath, PhaseTimeout) as error:
                self.restart(error, phase=phase)

    def restart(self, error: ActorDeath | PhaseTimeout, *, phase: str) -> None:
        """End and start all ranks, and go on from where they were; or raise `error`."""
        while True:
            if self.restarts is None or not any(name in error.actor for name in self.actors):
                raise error
            restart = self.restarts.begin(self.role, error, phase=phase, step=self.step)
            try:
                with self.timeline.doing(self.actors, self.timeline_role, "restart"):
                    restart.wait()
                    try:
                        self.start_again()
                    except SnapshotLost as lost:  # it may have changed some ranks
                        print(f"note: {lost}", flush=True)
                        self.start_again()
            except (ActorDeath, PhaseTimeout) as again:
                error, phase = again, "restart"
            else:
                restart.done()
                return

    def start_again(self) -> None:
        """End and start all ranks, and go on from where they were."""
        self.snapshots.forget_begun()
        self.close()
        self.take_gpus()
        self.is_starting = True
        self.actors = {name: self.create(rank) for rank, name in enumerate(self.actors)}
        self.may_be_stuck = False
        phase = f"restart of the {self.role}"
        get_all(self.async_start(), phase=phase, timeout_s=START_TIMEOUT_S)
        self.is_starting = False
        self.go_back()

    @abstractmethod
    def take_gpus(self) -> None:
        """Return when ranks that start find their GPUs free."""

    @property
    def heals(self) -> bool:
        """Whether ranks that fail are started again."""
        return self.restarts is not None and self.restarts.enabled

    @property
    @abstractmethod
    def step(self) -> int:
        """The step that the run is in, for messages."""

    @abstractmethod
    def go_back(self) -> None:
        """Give ranks that have just started the state that the ended ones had."""

    def begin_snapshot(self, version: int) -> None:
        """Have the ranks take a snapshot if one is due; they go on working."""
        if not self.snapshots.is_due(version):
            return
        self.snapshots.begin(
            version,
            {name: actor.take_snapshot.remote(version) for name, actor in self.actors.items()},
        )
        if self.config.is_colocated:  # what is copied is about to move
            self.settle_snapshots()

    def restore(self, snapshot: Snapshot) -> None:
        """Give the ranks the state of a snapshot.

        Raises:
            ActorDeath, PhaseTimeout: a rank failed.
            SnapshotLost: the node that had a state is gone, or its bytes are others.
        """
        refs = {
            name: actor.restore_snapshot.remote(snapshot.states[name])
            for name, actor in self.actors.items()
        }
        try:
            get_all(refs, phase=f"{self.role} restore_snapshot", timeout_s=self.timeout_s)
        except ActorDeath:
            raise
        except ActorFailure as error:
            self.snapshots.newest = None
            raise SnapshotLost(snapshot.version, error) from error

    def compute_logprobs(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the tokens and entropies of their predictions, at the sampling temperature.

        Two [N, S] float32 in nats, 0 where masked. Each data-parallel rank computes some rows.
        """
        return self._gather_logprobs("compute_logprobs", batch)

    def compute_predictions(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the tokens in nats, and 1 where no other token is likelier, else 0.

        Two [N, S] float32, 0 where masked.
        """
        return self._gather_logprobs("compute_predictions", batch)

    def _gather_logprobs(self, method: str, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The two values that all ranks' `method` returns of tokens, each rank for its rows."""
        first, second = (torch.zeros(batch.input_ids.shape) for _ in range(2))
        for result in self.call_in_turn(method, ray.put(batch)):
            if result is not None:
                rows, values = result
                first[rows], second[rows] = values
        return first, second

    def save_model(self, folder: Path) -> None:
        """Write a Hugging Face model folder; whole or not at all."""
        self.call_in_turn("save_model", folder)

    def begin_model(self, folder: Path) -> Callable[[], dict[str, FileSum]]:
        """Start writing a Hugging Face model folder, see `files_from`."""
        return self.files_from("begin_model", folder)

    def files_from(self, method: str, folder: Path) -> Callable[[], dict[str, FileSum]]:
        """Have the ranks copy what they will write into a folder, with `method`.

        Returns:
            a function for any thread. It waits until the files are on the disk, and returns their
            sums by name.
        """
        others = set(folder.iterdir())

        def begin() -> dict[str, Any]:
            for path in set(folder.iterdir()) - others:  # ranks that failed have left it
                remove(path)
            self.call_once(method, folder)
            return dict(self.actors)

        # Ranks that are restarted later have nothing to write: they must not be taken for these.
        actors = self.healed(method, begin)
        deadline = time.monotonic() + self.timeout_s

        def await_files() -> dict[str, FileSum]:
            while True:
                # A disk that refuses a file leaves no rank in a collective, see `call`.
                refs = {name: actor.sums_of_files.remote(folder) for name, actor in actors.items()}
                parts = get_all(refs, phase=f"{self.role} {method}", timeout_s=self.timeout_s)
                if None not in parts:
                    return {name: sums for part in parts for name, sums in part.items()}
                if time.monotonic() > deadline:
                    raise PhaseTimeout(f"{folder} was not written in time (policy.timeout_s)")
                time.sleep(POLL_S)

        return await_files
