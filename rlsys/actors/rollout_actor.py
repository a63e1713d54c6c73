"""A rollout engine as a Ray actor."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import ray

from rlsys.actors.heartbeat import Alive
from rlsys.actors.process import StoppedProcesses, begin_process
from rlsys.config import Config
from rlsys.engines.loop import EngineLoop, Outcome
from rlsys.leftovers import guard_actor
from rlsys.types import Device, DraftCounts, RolloutGroup, SampleRequest
from rlsys.weight_sync.connection import Endpoint
from rlsys.weight_sync.plan import TensorSlice

if TYPE_CHECKING:
    from rlsys.engines.chat_server import Server
    from rlsys.engines.profiling import Traced
    from rlsys.engines.vllm.engine import VLLMEngine

T = TypeVar("T")


class RolloutActor(Alive):
    """One vLLM engine in a process of its own.

    It answers calls while it samples: between two tokens, in the order in which they arrive. Ray
    may change the order of calls on their way to an async actor.
    """

    _loop: EngineLoop[Any]  # of the VLLMEngine, or of ServerActor's engine, which has no weights

    def __init__(self, config: Config, device: Device, engine_rank: int):
        begin_process()
        guard_actor()

        def build() -> VLLMEngine:
            from rlsys.engines.vllm.engine import VLLMEngine  # takes seconds

            return VLLMEngine(
                config.model.path, config=config, device=device, engine_rank=engine_rank
            )

        self._loop = EngineLoop(build)  # returns at once: an actor that loads gives signs of life
        self._pauses = asyncio.Semaphore(0)
        """Pauses that no `update_weights` has used yet."""
        self._has_workers = config.rollout.tensor_parallel_size > 1
        self._stopped = StoppedProcesses()

    def find_fault(self) -> str | None:
        """See Alive: a worker process of vLLM is stopped, so its engine waits for ever."""
        if not self._has_workers:
            return None
        stopped = self._stopped.among(psutil.Process().children(recursive=True))
        for worker in stopped:
            os.kill(worker.pid, signal.SIGKILL)  # it could not end with this process
        return "a worker process of vLLM was stopped" if stopped else None

    async def start(self) -> float:
        """Wait for the engine; returns the seconds that importing vLLM and loading took."""
        return await asyncio.wrap_future(self._loop.built)

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

    async def start_trace(self, operations: bool, memory: bool) -> None:
        """See VLLMEngine.start_trace."""
        await self._call(lambda engine: engine.start_trace(operations, memory))

    async def stop_trace(self, folder: Path, member: str) -> list[Traced]:
        """See VLLMEngine.stop_trace."""
        return await self._call(lambda engine: engine.stop_trace(folder, member))

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
        begin_process()
        from rlsys.engines.chat_server import ServerEngine  # imports transformers

        self._loop = EngineLoop(lambda: ServerEngine(server, config))
        self._has_workers = False
