"""Reward workers: Ray actors, each with a reward process on its node, killed when it hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from rlsys.actors.group import Place, device_env, inherited_env
from rlsys.config import RewardConfig
from rlsys.rewards import check_names_and_weights, load_plugins
from rlsys.rewards.pool.pool import RewardPool
from rlsys.rewards.pool.process import Died, RewardProcess
from rlsys.rewards.pool.runner import Failed, ProcessSettings, Task, Values, process_settings
from rlsys.rewards.pool.work import ProcessDied

WORKER_CPUS = 0.01
"""Ray's bookkeeping only: rewards share the cores with whatever is idle at the time."""


class RewardWorker:
    """Starts one reward process on its node and hands it tasks. User code runs in the process."""

    def __init__(self) -> None:
        self._process: RewardProcess | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}

    async def start(self, settings: ProcessSettings, concurrent: bool) -> Failed | Died | None:
        """Start it, and wait until it has its reward functions."""
        loop = asyncio.get_running_loop()
        self._calls[0] = loop.create_future()

        def take(number: int, result: Any) -> None:
            loop.call_soon_threadsafe(lambda: self._calls.pop(number).set_result(result))

        self._process = RewardProcess(settings, take, concurrent=concurrent)
        return await self._calls[0]

    async def score(self, task: Task) -> Values | Failed | Died:
        """Call one function for the completions of one prompt."""
        assert self._process is not None
        # The result comes through the loop, so it finds the future.
        call = self._calls[self._process.call(task)] = asyncio.get_running_loop().create_future()
        return await call


class RayBackend:
    """Reward processes as Ray actors; see `rlsys.rewards.pool.work.Backend`."""

    def __init__(
        self,
        settings: ProcessSettings,
        models: Sequence[str] = (),
        place: Place | None = None,
    ):
        """Args as of `RewardWorkers`; `models` are the names of reward models, which `place` is
        for."""
        self._settings = settings
        self._models = list(models)
        self._place = place
        self._options: dict[str, Any] = {
            "num_cpus": WORKER_CPUS,
            "runtime_env": {"env_vars": inherited_env()},
        }

    def spawn(self, names: Sequence[str], *, concurrent: bool) -> tuple[ActorHandle, ray.ObjectRef]:
        """Start an actor."""
        options = self._options
        if names[0] in self._models and self._place is not None:
            options = options | self._place(self._models.index(names[0]))
        elif names[0] in self._models:
            options = options | {"runtime_env": {"env_vars": inherited_env() | device_env("cpu")}}
        actor_class: Any = RewardWorker
        actor = ray.remote(**options)(actor_class).remote()
        return actor, actor.start.remote(replace(self._settings, names=names), concurrent)

    def score(self, process: ActorHandle, task: Task) -> ray.ObjectRef:
        """Send a task."""
        return process.score.remote(task)

    def wait(self, references: Sequence[ray.ObjectRef], timeout_s: float) -> list[ray.ObjectRef]:
        """All that are done, at least one unless time is over."""
        one, _ = ray.wait(list(references), timeout=timeout_s)
        more, _ = ray.wait(list(references), num_returns=len(references), timeout=0)
        return more or one

    def result(self, reference: ray.ObjectRef) -> Any:
        """Of a reference that is done."""
        try:
            result = ray.get(reference)
        except RayError as error:
            raise ProcessDied(str(error).strip().partition("\n")[0]) from None
        if isinstance(result, Died):
            raise ProcessDied(result.why)
        return result

    def kill(self, process: ActorHandle) -> None:
        """End the actor; the guard of its reward process ends that and what it started."""
        ray.kill(process)


class RewardWorkers(RewardPool):
    """Scores groups in Ray actors; `RewardPool` says how."""

    def __init__(
        self,
        config: RewardConfig,
        *,
        known: dict[str, Any] | None = None,
        max_steps: int = 0,
        place: Place | None = None,
        plugins: Sequence[str] = (),
    ):
        """Start the workers and wait until each has its reward functions.

        Args:
            config: names, settings, plugins, number of workers, limits and policies.
            known: values of the run for parameters of these names, see `settings_of`.
            max_steps: of the run, for `trainer_state`.
            place: Ray options of the processes of reward models, by the model's number; None
                keeps them on the CPU.
            plugins: files to load besides those of `config`.

        Raises:
            ValueError: a plugin that cannot be imported, an unknown reward function, or weights
                that do not fit; found before any process starts.
            RewardCodeError: a reward class that cannot be instantiated.
        """
        settings = process_settings(config, known or {}, plugins)
        load_plugins(settings.plugins)
        check_names_and_weights(config.names, config.reward_weights)
        backend = RayBackend(settings, config.models, place)
        super().__init__(config, backend, max_steps=max_steps)
