"""Rollout engines as Ray actors, and the driver's view of all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import ray
from ray import ObjectRefGenerator

from rlsys.actors.group import ActorGroup, PlaceActor, device_env, on_cpu
from rlsys.actors.heartbeat import Watched
from rlsys.actors.process import inherited_env
from rlsys.actors.rollout_actor import RolloutActor as RolloutActor
from rlsys.actors.rollout_actor import ServerActor
from rlsys.actors.silent import actor_of, explain_silence
from rlsys.actors.successors import Successors
from rlsys.actors.turns import Turns
from rlsys.actors.waiting import ActorFailure, PhaseTimeout, all_ready, get_all, get_one
from rlsys.config import Config
from rlsys.engines.vllm.settings import rollout_env
from rlsys.problems import RunFailed
from rlsys.types import Device, DraftCounts, RolloutGroup, SampleRequest
from rlsys.weight_sync.transport import WeightSyncError

if TYPE_CHECKING:
    from rlsys.actors.recovery import Restart
    from rlsys.actors.weight_publisher import WeightPublisher
    from rlsys.engines.chat_server import Server

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Work:
    engine: str
    pending: dict[int, SampleRequest]
    """What its stream has still to yield, by ticket."""


_LONGEST_WAIT_S = 1.0
"""Between two looks at whose restart is due."""
_WHY_NOT_SHARED = (
    "an engine that shares a GPU with the policy cannot be restarted while the policy has memory "
    "there: resume the run from its checkpoint"
)


class RolloutActors(ActorGroup):
    """All rollout engines as the driver sees them.

    Creating it starts the actors and returns; calls made before they are ready queue.

    If `restarts` allows it, an engine that fails leaves `actors`: the others sample what it had not
    finished, with the same seeds, and a new engine starts. It joins at the next weight sync. If no
    engine is left, requests wait, and `bring_back` has the weights published once one has started.

    Args:
        config: of the run.
        device, place: what the engines run on, and where.
        server: asked instead of engines; it takes no part in weight syncs.
    """

    turns: Turns = Turns()
    """Taken before engines sample."""
    publisher: WeightPublisher
    """What gives them the policy's weights; set where `restarts` is."""

    def __init__(
        self,
        config: Config,
        *,
        device: Device,
        place: PlaceActor = on_cpu,
        server: Server | None = None,
    ):
        rollout = config.rollout
        self.config = config
        self.num_engines = rollout.num_engines if server is None else 1
        self.why_no_restart = None if server is None else "the run did not start this server"
        """Why an engine that fails ends the run; None if it is replaced."""
        if config.is_colocated and device == "cuda":
            self.why_no_restart = _WHY_NOT_SHARED
        self.workers_per_engine = rollout.tensor_parallel_size
        """Processes that hold the model of one engine."""
        self.senders = [0] * rollout.engines_per_gpu
        """The policy rank that sends in each weight sync connection. Engine i receives in
        connection i modulo their number: NCCL allows one rank on a GPU, and engines on the policy's
        GPUs get weights from the rank there."""
        if config.is_colocated:
            self.senders = [i // rollout.engines_per_gpu for i in range(self.num_engines)]
        super().__init__(
            "rollout engines",
            "rollout engine",
            RolloutActor if server is None else ServerActor,
            config,
            device if server is None else server,
            size=self.num_engines,
            env=inherited_env() | device_env(device) | rollout_env(device),
            place=place,
            timeout_s=rollout.timeout_s,
        )
        self._streams: dict[ObjectRefGenerator, _Work] = {}
        self._reading: ObjectRefGenerator | None = None
        """The stream that `collect` reads."""
        self._aborts: dict[ray.ObjectRef, str] = {}
        """The engine that each unanswered `abort` went to."""
        self._waiting: list[SampleRequest] = []
        """Requests that no engine has, because none is left."""
        self._successors = Successors(lambda name: self.create(self._names.index(name)))
        self._joining: dict[str, Restart] = {}
        """Engines that have started and wait for weights."""
        self._members = dict(self.actors)
        """The actors at the last `take_in`."""
        self._drafts: dict[str, DraftCounts] = {}
        self._drafts_of_lost = DraftCounts(0, 0, 0)
        self._lock = threading.RLock()  # the background collects while the driver publishes

    def watched(self) -> list[Watched]:
        """See ActorGroup."""
        return [*super().watched(), *self._successors.watched()]

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Start sampling; each request goes to the engine that has the fewest groups."""
        self.turns.take_for_rollouts()
        with self._lock:
            self._deal(requests)

    def _deal(self, requests: Sequence[SampleRequest]) -> None:
        if not self.actors:
            self._waiting += requests
            return
        loads = dict.fromkeys(self.actors, 0)
        for work in self._streams.values():
            loads[work.engine] += len(work.pending)
        for name, share in deal(requests, loads).items():
            stream = self.actors[name].generate.remote(share)
            self._streams[stream] = _Work(name, {request.ticket: request for request in share})
        self._note_work()

    def _note_work(self) -> None:
        """Tell the timeline which engines sample, and which are replaced."""
        busy = {work.engine for work in self._streams.values()}
        for name in self._names:
            doing = "sample" if name in busy else None
            if name not in self.actors or name in self._joining:
                doing = "restart"
            self.timeline.now_doing(name, self.timeline_role, doing)

    def abort(self, tickets: Collection[int]) -> None:
        """Give up groups: `collect` does not return them."""
        with self._lock:
            self._waiting = [one for one in self._waiting if one.ticket not in tickets]
            for stream, work in list(self._streams.items()):
                given_up = sorted(work.pending.keys() & set(tickets))
                if given_up:
                    ref = self.actors[work.engine].abort.remote(given_up)
                    self._aborts[ref] = work.engine
                    self._keep(stream, without(work, given_up))
            self._note_work()

    def draft_counts(self) -> DraftCounts:
        """What became of the drafts of all engines so far."""
        with self._lock:
            try:
                self._drafts |= dict(zip(self.actors, self.call("draft_counts"), strict=True))
            except ActorFailure as error:
                self.restart(error, phase="counting drafts")
            return sum(self._drafts.values(), start=self._drafts_of_lost)

    @property
    def num_pending(self) -> int:
        """Groups submitted and not collected yet."""
        return len(self._waiting) + sum(len(work.pending) for work in self._streams.values())

    def pending_refs(self) -> list[ObjectRefGenerator | ray.ObjectRef]:
        """What to wait for: a stream is ready when `collect` finds something.

        With no engine left, `bring_back` has something to do when one of these is ready.
        """
        return list(self._streams) if self.actors else self._successors.refs()

    def explain_silence(self) -> str:
        """What the engines do that have still to answer, and where their stacks are."""
        return explain_silence({work.engine: actor_of(s) for s, work in self._streams.items()})

    def collect(self) -> list[RolloutGroup]:
        """The groups that are finished, without waiting.

        Raises:
            ActorFailure: an engine raised, died or lost groups, or could not give up some, and
                nothing may be restarted.
            RunFailed: engines fail too often, or twice in the same place.
        """
        groups: list[RolloutGroup] = []
        with self._lock:
            while True:
                try:
                    self._collect_into(groups)
                except ActorFailure as error:
                    try:
                        self.restart(error, phase="rollout")
                    finally:  # without a restart too, this stream has ended
                        streams = self._streams.items()
                        self._streams = {s: work for s, work in streams if s is not self._reading}
                else:
                    self._note_work()
                    return groups

    def _collect_into(self, groups: list[RolloutGroup]) -> None:
        self._reading = None
        for ref in all_ready(list(self._aborts)):
            get_one(ref, name=self._aborts.pop(ref), phase="giving up groups")
        while ready := all_ready(list(self._streams)):
            for stream in ready:
                self._reading = stream
                group = self._next_group(stream)
                groups += [] if group is None else [group]

    def _next_group(self, stream: ObjectRefGenerator) -> RolloutGroup | None:
        """The next group of a stream; None if it was given up on its way."""
        work = self._streams[stream]
        ref = next(stream, None)
        if ref is None:
            reason = f"it ended its rollout {len(work.pending)} groups early"
            raise ActorFailure(f"{work.engine}: {reason}", actor=work.engine, reason=reason)
        group: RolloutGroup = get_one(ref, name=work.engine, phase="rollout")
        self._keep(stream, without(work, [group.ticket]))
        return group if group.ticket in work.pending else None

    def _keep(self, stream: ObjectRefGenerator, work: _Work) -> None:
        """Keep listening to `stream` while more groups are to come."""
        self._streams.pop(stream, None)
        if work.pending:
            self._streams[stream] = work

    # --- engines that fail -----------------------------------------------------------------------

    def restart(self, error: ActorFailure, *, phase: str) -> None:
        """Replace an engine that failed, and give its requests to the others; or raise an error.

        Raises:
            ActorFailure: `error` itself, if it is of another actor or due to what the engine got,
                or if nothing may be restarted.
            RunFailed: engines fail too often or twice in the same place, or cannot be restarted.
        """
        name = error.actor
        with self._lock:
            if name in self._successors:  # the other thread of the driver has seen it too
                return
            if self.restarts is None or not self.restarts.enabled or name not in self.actors:
                raise error
            if isinstance(error.cause, (ValueError, WeightSyncError)):
                raise error
            if self.why_no_restart is not None:
                raise RunFailed(f"{error}\n{name}: {self.why_no_restart}") from error
            self._successors.begin(name, self._begin_restart(error, phase))
            self._drop(name)

    def _begin_restart(self, error: ActorFailure, phase: str) -> Restart:
        assert self.restarts is not None
        step = self.publisher.published + 1
        return self.restarts.begin("rollout", error, phase=phase, step=step)

    def _drop(self, name: str) -> None:
        ray.kill(self.actors.pop(name))  # one that raised still lives
        self._joining.pop(name, None)
        self._drafts_of_lost += self._drafts.pop(name, DraftCounts(0, 0, 0))
        self._aborts = {ref: engine for ref, engine in self._aborts.items() if engine != name}
        lost: list[SampleRequest] = []
        for stream, work in list(self._streams.items()):
            if work.engine == name:
                lost += self._streams.pop(stream).pending.values()
        self._deal(lost)

    def restart_silent(self, error: PhaseTimeout) -> None:
        """Replace the engines that work on groups, since none has finished one in time."""
        names = {work.engine for work in self._streams.values()}
        if self.restarts is None or not self.restarts.enabled or not names:
            raise error
        for name in names:
            reason = f"it finished no group within {self.timeout_s:g} s"
            self.restart(ActorFailure(str(error), actor=name, reason=reason), phase="rollout")

    def bring_back(self) -> bool:
        """If no engine is left, have the first successor that has started get weights.

        Call it while the policy is idle.

        Returns:
            whether requests wait for an engine that is on its way.
        """
        with self._lock:
            self._successors.start_due()
            waits = not self.actors
        if waits and all_ready(self._successors.refs()):
            self.publisher.publish()
        return waits

    def take_in(self, *, timeout_s: float) -> bool:
        """Take in the successors that have started; if no engine is left, wait for one.

        Returns:
            whether engines came or left since the last call, so that connections are to be made
            again.

        Raises:
            PhaseTimeout: none has started after `timeout_s` seconds.
            RunFailed: they fail too often or twice at their start.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while self._successors:
                try:
                    for name, actor, restart in self._successors.started(
                        timeout_s=0.0 if self.actors else _LONGEST_WAIT_S
                    ):
                        if self.config.is_colocated:  # as the others when a weight sync begins
                            asleep = {name: actor.sleep.remote()}
                            get_all(asleep, phase="restart", timeout_s=self.timeout_s)
                        self.actors[name] = actor
                        self._joining[name] = restart
                except ActorFailure as error:
                    again = self._begin_restart(error, "restart")
                    self._successors.begin(error.actor, again)
                if self.actors:
                    break
                if time.monotonic() > deadline:
                    raise PhaseTimeout(f"no rollout engine started again within {timeout_s:g} s")
            self.actors = {name: self.actors[name] for name in self._names if name in self.actors}
            before, self._members = self._members, dict(self.actors)
        return self._members != before

    def healed(self, phase: str, work: Callable[[], T]) -> T:
        """What a weight sync returns, which is done again if engines fail in it.

        Afterwards all engines sample with the policy's weights, those too that have joined.

        Raises:
            ActorFailure, RunFailed: see `restart`.
        """
        while True:
            try:
                result = work()
            except (ActorFailure, PhaseTimeout) as error:
                for failure in self._failures(error):
                    self.restart(failure, phase=phase)
                continue
            with self._lock:
                for restart in self._joining.values():
                    restart.done()
                self._joining.clear()
                waiting, self._waiting = self._waiting, []
                self._deal(waiting)
                self._note_work()
            return result

    def _failures(self, error: ActorFailure | PhaseTimeout) -> list[ActorFailure]:
        """That of each engine for which others waited in vain; otherwise `error` itself.

        Raises:
            PhaseTimeout: no engine is silent.
        """
        reason = "it took no part, though its process gives signs of life"
        silent = [name for name in error.silent if name in self.actors]
        if silent:
            return [ActorFailure(str(error), actor=name, reason=reason) for name in silent]
        if isinstance(error, PhaseTimeout):
            raise error
        return [error]


def deal(
    requests: Sequence[SampleRequest], loads: dict[str, int]
) -> dict[str, list[SampleRequest]]:
    """Requests by the engine that gets them: the one with the fewest groups, the first of several.

    Args:
        loads: groups that each engine has already; raised by what it gets.
    """
    shares: dict[str, list[SampleRequest]] = {}
    for request in requests:
        name = min(loads, key=lambda name: loads[name])
        loads[name] += 1
        shares.setdefault(name, []).append(request)
    return shares


def without(work: _Work, tickets: Collection[int]) -> _Work:
    """Work without some groups."""
    left = {ticket: one for ticket, one in work.pending.items() if ticket not in tickets}
    return replace(work, pending=left)
