"""Rollout engines as Ray actors, and the driver's view of all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import ObjectRefGenerator

from rlsys.actors.group import ActorGroup, PlaceActor, device_env, inherited_env, on_cpu
from rlsys.actors.heartbeat import Alive
from rlsys.actors.silent import actor_of, explain_silence
from rlsys.actors.turns import Turns
from rlsys.actors.waiting import ActorFailure, all_ready, get_one
from rlsys.config import Config
from rlsys.engines.loop import EngineLoop, Outcome
from rlsys.engines.vllm.settings import rollout_env
from rlsys.leftovers import guard_actor
from rlsys.stacks import answer_for_stacks
from rlsys.types import Device, DraftCounts, RolloutGroup, SampleRequest
from rlsys.weight_sync.connection import Endpoint
from rlsys.weight_sync.plan import TensorSlice

if TYPE_CHECKING:
    from rlsys.engines.chat_server import Server
    from rlsys.engines.vllm.engine import VLLMEngine

T = TypeVar("T")


class RolloutActor(Alive):
    """One vLLM engine in a process of its own.

    It answers calls while it samples: between two tokens, in the order in which they arrive. Ray
    may change the order of calls on their way to an async actor.
    """

    _loop: EngineLoop[Any]  # of the VLLMEngine, or of ServerActor's engine, which has no weights

    def __init__(self, config: Config, device: Device, engine_rank: int):
        answer_for_stacks()
        start = time.monotonic()
        guard_actor()
        from rlsys.engines.vllm.engine import VLLMEngine  # takes seconds

        self._loop = EngineLoop(
            lambda: VLLMEngine(
                config.model.path, config=config, device=device, engine_rank=engine_rank
            )
        )
        self._pauses = asyncio.Semaphore(0)
        """Pauses that no `update_weights` has used yet."""
        self._start_seconds = time.monotonic() - start

    async def start(self) -> float:
        """Seconds that importing vLLM and loading the model took."""
        return self._start_seconds

    @ray.method(num_returns="streaming")
    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[RolloutGroup]:
        """The groups of `requests`, each as soon as it is finished, without the aborted ones."""
        ended: asyncio.Queue[Outcome] = asyncio.Queue()
        in_this_thread = asyncio.get_running_loop().call_soon_threadsafe
        self._loop.sample(requests, lambda outcome: in_this_thread(ended.put_nowait, outcome))
        for _ in requests:
            outcome = await ended.get()
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is not None:
                yield outcome

    async def abort(self, tickets: Sequence[int]) -> None:
        """Give up groups. A group whose `generate` arrives later is sampled all the same."""
        await asyncio.wrap_future(self._loop.abort(tickets))

    async def connect_weight_sync(self, endpoints: Sequence[Sequence[Endpoint]]) -> None:
        """See VLLMEngine.connect_weight_sync."""
        await self._call(lambda engine: engine.connect_weight_sync(endpoints))

    async def needed_slices(self) -> list[tuple[TensorSlice, ...] | None]:
        """See VLLMEngine.needed_slices."""
        return await self._call(lambda engine: engine.needed_slices())

    async def start_weight_update(self) -> None:
        """See VLLMEngine.start_weight_update."""
        pausing = self._call(lambda engine: engine.start_weight_update())
        self._pauses.release()
        await pausing

    async def update_weights(self, policy_version: int) -> int:
        """See VLLMEngine.update_weights. Waits for its pause, whichever call arrives first."""
        await self._pauses.acquire()
        return await self._call(lambda engine: engine.update_weights(policy_version))

    async def draft_counts(self) -> DraftCounts:
        """See VLLMEngine.draft_counts."""
        return await self._call(lambda engine: engine.draft_counts())

    async def sleep(self) -> None:
        """See VLLMEngine.sleep."""
        await self._call(lambda engine: engine.sleep())

    async def wake(self) -> None:
        """See VLLMEngine.wake."""
        await self._call(lambda engine: engine.wake())

    def _call(self, command: Callable[[VLLMEngine], T]) -> asyncio.Future[T]:
        return asyncio.wrap_future(self._loop.call(command))


class ServerActor(RolloutActor):
    """Asks a server for completions, as if it were an engine in this process."""

    def __init__(self, config: Config, server: Server, engine_rank: int):
        answer_for_stacks()
        start = time.monotonic()
        from rlsys.engines.chat_server import ServerEngine  # imports transformers

        self._loop = EngineLoop(lambda: ServerEngine(server, config))
        self._start_seconds = time.monotonic() - start


@dataclass(frozen=True, slots=True)
class _Work:
    engine: str
    pending: set[int]
    """The tickets that its stream has still to yield."""


class RolloutActors(ActorGroup):
    """All rollout engines as the driver sees them.

    Creating it starts the actors and returns; calls made before they are ready queue.

    Args:
        config: of the run.
        device, place: what the engines run on, and where.
        server: asked instead of engines; it takes no part in weight syncs.
    """

    turns: Turns = Turns()
    """Taken before engines sample."""

    def __init__(
        self,
        config: Config,
        *,
        device: Device,
        place: PlaceActor = on_cpu,
        server: Server | None = None,
    ):
        rollout = config.rollout
        self.num_engines = rollout.num_engines if server is None else 1
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
        self._aborts: dict[ray.ObjectRef, str] = {}
        """The engine that each unanswered `abort` went to."""

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Start sampling; each request goes to the engine that has the fewest groups."""
        self.turns.take_for_rollouts()
        loads = dict.fromkeys(self.actors, 0)
        for work in self._streams.values():
            loads[work.engine] += len(work.pending)
        shares: dict[str, list[SampleRequest]] = {name: [] for name in self.actors}
        for request in requests:
            name = min(loads, key=lambda name: loads[name])  # the first of several
            loads[name] += 1
            shares[name].append(request)
        for name, share in shares.items():
            if share:
                stream = self.actors[name].generate.remote(share)
                self._streams[stream] = _Work(name, {request.ticket for request in share})

    def abort(self, tickets: Collection[int]) -> None:
        """Give up groups: `collect` does not return them."""
        for stream, work in list(self._streams.items()):
            given_up = work.pending.intersection(tickets)
            if given_up:
                ref = self.actors[work.engine].abort.remote(sorted(given_up))
                self._aborts[ref] = work.engine
                self._keep(stream, replace(work, pending=work.pending - given_up))

    def draft_counts(self) -> DraftCounts:
        """What became of the drafts of all engines so far."""
        counts: list[DraftCounts] = self.call("draft_counts")
        return sum(counts, start=DraftCounts(0, 0, 0))

    @property
    def num_pending(self) -> int:
        """Groups submitted and not collected yet."""
        return sum(len(work.pending) for work in self._streams.values())

    def pending_refs(self) -> list[ObjectRefGenerator]:
        """What to wait for: a stream is ready when `collect` finds something."""
        return list(self._streams)

    def explain_silence(self) -> str:
        """What the engines do that have still to answer, and where their stacks are."""
        return explain_silence({work.engine: actor_of(s) for s, work in self._streams.items()})

    def collect(self) -> list[RolloutGroup]:
        """The groups that are finished, without waiting.

        Raises:
            ActorFailure: an engine raised, died or lost groups, or could not give up some.
        """
        for ref in all_ready(list(self._aborts)):
            get_one(ref, name=self._aborts.pop(ref), phase="giving up groups")
        groups = []
        while ready := all_ready(list(self._streams)):
            for stream in ready:
                group = self._next_group(stream)
                groups += [] if group is None else [group]
        return groups

    def _next_group(self, stream: ObjectRefGenerator) -> RolloutGroup | None:
        """The next group of a stream; None if it was given up on its way."""
        work = self._streams.pop(stream)
        ref = next(stream, None)
        if ref is None:
            reason = f"it ended its rollout {len(work.pending)} groups early"
            raise ActorFailure(f"{work.engine}: {reason}", actor=work.engine, reason=reason)
        group: RolloutGroup = get_one(ref, name=work.engine, phase="rollout")
        self._keep(stream, replace(work, pending=work.pending - {group.ticket}))
        return group if group.ticket in work.pending else None

    def _keep(self, stream: ObjectRefGenerator, work: _Work) -> None:
        """Keep listening to `stream` while more groups are to come."""
        self._streams.pop(stream, None)
        if work.pending:
            self._streams[stream] = work
