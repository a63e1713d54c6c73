"""Rollout engines as Ray actors, and the driver's view of all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import ObjectRefGenerator

from rlsys.actors.group import (
    START_TIMEOUT_S,
    ActorFailure,
    Place,
    device_env,
    get_all,
    get_one,
    inherited_env,
    on_cpu,
)
from rlsys.config import Config
from rlsys.engines.vllm.loop import EngineLoop, Outcome
from rlsys.engines.vllm.settings import rollout_env
from rlsys.types import Device, RolloutGroup, SampleRequest
from rlsys.weight_sync.connection import Endpoint
from rlsys.weight_sync.plan import TensorSlice


class RolloutActor:
    """One vLLM engine in a process of its own.

    Calls are answered while it samples: between two tokens, in the order in which they came. That
    is not always the order in which they were made: Ray keeps none among those of an async actor.
    """

    def __init__(self, config: Config, device: Device, engine_rank: int):
        start = time.monotonic()
        from rlsys.engines.vllm.engine import (
            VLLMEngine,  # takes seconds, and only this process needs it
        )

        self._loop = EngineLoop(
            lambda: VLLMEngine(
                config.model.path, config=config, device=device, engine_rank=engine_rank
            )
        )
        self._pauses = asyncio.Semaphore(0)
        """Of weight updates: asked for, and not yet followed by its `update_weights`."""
        self._start_seconds = time.monotonic() - start

    async def start_seconds(self) -> float:
        """How long importing vLLM and loading the model took."""
        return self._start_seconds

    @ray.method(num_returns="streaming")
    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[RolloutGroup]:
        """The groups of `requests`, each as soon as it is finished; none for what is aborted."""
        ended: asyncio.Queue[Outcome] = asyncio.Queue()
        tell = asyncio.get_running_loop().call_soon_threadsafe
        self._loop.sample(requests, lambda outcome: tell(ended.put_nowait, outcome))
        for _ in requests:
            outcome = await ended.get()
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is not None:
                yield outcome

    async def abort(self, group_ids: Sequence[int]) -> None:
        """Give up groups. One whose `generate` comes later is sampled all the same, for nobody."""
        await asyncio.wrap_future(self._loop.abort(group_ids))

    async def connect_weight_sync(self, endpoints: Sequence[Sequence[Endpoint]]) -> None:
        """See VLLMEngine.connect_weight_sync."""
        await self._call("connect_weight_sync", endpoints)

    async def needed_slices(self) -> list[tuple[TensorSlice, ...] | None]:
        """See VLLMEngine.needed_slices."""
        return await self._call("needed_slices")

    async def start_weight_update(self) -> None:
        """See VLLMEngine.start_weight_update."""
        pausing = self._call("start_weight_update")
        self._pauses.release()
        await pausing

    async def update_weights(self, policy_version: int) -> int:
        """See VLLMEngine.update_weights. Waits for its pause, even if the pause arrives later."""
        await self._pauses.acquire()
        return await self._call("update_weights", policy_version)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self._loop.call(method, *args, **kwargs))


@dataclass(frozen=True, slots=True)
class _Work:
    engine: str
    pending: set[int]
    """The group_ids that its stream has still to yield."""


class RolloutActors:
    """All rollout engines as the driver sees them.

    Creating it starts the actors and returns; `wait_ready` waits for them. Calls made before
    simply queue.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: Device,
        place: Place = on_cpu,
    ):
        rollout = config.rollout
        self.num_engines = rollout.num_engines
        self.workers_per_engine = rollout.tensor_parallel_size  # processes that hold a model
        self.engines_per_gpu = rollout.engines_per_gpu
        runtime_env = {"env_vars": inherited_env() | device_env(device) | rollout_env(device)}
        actor_class = ray.remote(RolloutActor)
        self.actors: dict[str, Any] = {
            f"rollout engine {rank}": actor_class.options(
                runtime_env=runtime_env, **place(rank)
            ).remote(config, device, rank)
            for rank in range(rollout.num_engines)
        }
        self._streams: dict[ObjectRefGenerator, _Work] = {}
        self._aborts: dict[ray.ObjectRef, str] = {}
        """The engine that each unanswered `abort` went to."""

    def async_start(self) -> dict[str, ray.ObjectRef]:
        """Each engine's reference is ready when the engine is."""
        return self._async_call("start_seconds")

    def wait_ready(self) -> dict[str, float]:
        """Wait until every engine is up: actor name -> seconds that its start took."""
        refs = self.async_start()
        seconds = get_all(refs, phase="start of the rollout engines", timeout_s=START_TIMEOUT_S)
        return dict(zip(refs, seconds, strict=True))

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Start sampling; each request goes to the engine that has the fewest groups."""
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
                self._streams[stream] = _Work(name, {request.group_id for request in share})

    def abort(self, group_ids: Collection[int]) -> None:
        """Give up groups: they are not collected any more."""
        for stream, work in list(self._streams.items()):
            given_up = work.pending.intersection(group_ids)
            if given_up:
                ref = self.actors[work.engine].abort.remote(sorted(given_up))
                self._aborts[ref] = work.engine
                self._keep(stream, replace(work, pending=work.pending - given_up))

    @property
    def num_pending(self) -> int:
        """Groups submitted and not collected yet."""
        return sum(len(work.pending) for work in self._streams.values())

    def pending_refs(self) -> list[ObjectRefGenerator]:
        """For `ray.wait`, which takes streams as it takes references: ready when `collect` finds
        something."""
        return list(self._streams)

    def collect(self) -> list[RolloutGroup]:
        """Groups that finished by now, without waiting.

        Raises:
            ActorFailure: an engine raised, died, or lost groups; or it could not give up some.
        """
        self._check_aborts()
        groups = []
        while self._streams:
            streams = list(self._streams)
            ready, _ = ray.wait(streams, num_returns=len(streams), timeout=0)
            if not ready:
                break
            for stream in ready:
                group = self._next_group(stream)
                groups += [] if group is None else [group]
        return groups

    def _check_aborts(self) -> None:
        if not self._aborts:
            return
        done, _ = ray.wait(list(self._aborts), num_returns=len(self._aborts), timeout=0)
        for ref in done:
            get_one(ref, name=self._aborts.pop(ref), phase="giving up groups")

    def _next_group(self, stream: ObjectRefGenerator) -> RolloutGroup | None:
        """None when it has been given up while it was on its way."""
        work = self._streams.pop(stream)
        ref = next(stream, None)
        if ref is None:
            raise ActorFailure(f"{work.engine} ended its rollout {len(work.pending)} groups early")
        group: RolloutGroup = get_one(ref, name=work.engine, phase="rollout")
        self._keep(stream, replace(work, pending=work.pending - {group.group_id}))
        return group if group.group_id in work.pending else None

    def _keep(self, stream: ObjectRefGenerator, work: _Work) -> None:
        """Go on listening to `stream`, unless there is nothing more to come."""
        self._streams.pop(stream, None)
        if work.pending:
            self._streams[stream] = work

    def async_connect_weight_sync(
        self, endpoints: Sequence[Sequence[Endpoint]]
    ) -> dict[str, ray.ObjectRef]:
        """Connect each worker to its endpoint [engine][worker]; earlier connections end."""
        return self._async_call("connect_weight_sync", endpoints)

    def async_needed_slices(self) -> dict[str, ray.ObjectRef]:
        """The slices that each worker of each engine needs, in the order of the tensors.

        None stands for a worker that needs whole tensors.
        """
        return self._async_call("needed_slices")

    def async_start_weight_update(self) -> dict[str, ray.ObjectRef]:
        """Pause sampling until the end of `async_update_weights`."""
        return self._async_call("start_weight_update")

    def async_update_weights(self, policy_version: int) -> dict[str, ray.ObjectRef]:
        """Receive weights, compare checksums, and sample with the new weights.

        The results are the versions that the engines now hold. The call may come right after
        `async_start_weight_update`: an engine pauses first.
        """
        return self._async_call("update_weights", policy_version)

    def close(self) -> None:
        """Kill the engines; whatever they do is given up."""
        for actor in self.actors.values():
            ray.kill(actor)

    def _async_call(self, method: str, *args: Any, **kwargs: Any) -> dict[str, ray.ObjectRef]:
        return {
            name: getattr(actor, method).remote(*args, **kwargs)
            for name, actor in self.actors.items()
        }
