"""Reward workers: Ray actors, each with a reward process on its node, killed when it hangs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from rlsys.actors.group import CPU_SHARE, PlaceActor, device_env, name_in_ray
from rlsys.actors.heartbeat import Alive, Watched
from rlsys.actors.process import StoppedProcesses, begin_process, inherited_env
from rlsys.actors.waiting import FETCH_S, all_ready, any_ready
from rlsys.config import RewardConfig
from rlsys.plugins.load import load_plugins
from rlsys.rewards import check_functions
from rlsys.rewards.pool.process import RewardProcess
from rlsys.rewards.pool.scorer import GroupScorer
from rlsys.rewards.pool.serve import Failed, ProcessSettings, ScoreRequest, process_settings
from rlsys.rewards.scoring import Scored
from rlsys.stacks import ANSWER_S


class RewardWorker(Alive):
    """Starts a reward process on its node, which runs the user code, and sends it requests."""

    def __init__(self) -> None:
        begin_process()
        self._process: RewardProcess | None = None
        self._stopped = StoppedProcesses()

    def find_fault(self) -> str | None:
        """See Alive: nobody waits for a process that is stopped as for a function that is slow."""
        if self._process is None or not psutil.pid_exists(self._process.pid):
            return None
        stopped = self._stopped.among([psutil.Process(self._process.pid)])
        return "its reward process was stopped" if stopped else None

    async def start(self, settings: ProcessSettings, concurrent: bool) -> Failed | None:
        """Start it, and wait until it has its reward functions."""
        self._process = RewardProcess(settings, concurrent=concurrent)
        return await asyncio.wrap_future(self._process.started)

    async def score(self, request: ScoreRequest) -> Scored | Failed:
        """Call one function for the completions of one prompt."""
        assert self._process is not None
        return await asyncio.wrap_future(self._process.score(request))

    async def whereabouts(self) -> str:
        """The stack of the reward process's main thread."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.whereabouts)


class RayBackend:
    """A `Backend` whose reward processes are started by Ray actors."""

    def __init__(
        self,
        settings: ProcessSettings,
        models: Sequence[str] = (),
        place: PlaceActor | None = None,
        place_worker: PlaceActor | None = None,
    ):
        """`models` names the reward models; for the others see `RewardWorkers`."""
        self._settings = settings
        self._models = list(models)
        self._place, self._place_worker = place, place_worker
        self._numbers = itertools.count()
        self._actors: dict[str, tuple[ActorHandle, ray.ObjectRef]] = {}
        """Name -> actor, and the result of its start; a name is used again."""
        self._options: dict[str, Any] = {
            "num_cpus": CPU_SHARE,
            "runtime_env": {"env_vars": inherited_env()},
        }

    def spawn(
        self, functions: Sequence[str], *, concurrent: bool
    ) -> tuple[ActorHandle, ray.ObjectRef]:
        """Start an actor."""
        options, number = self._options, next(self._numbers)
        is_model = functions[0] in self._models
        if is_model and self._place is not None:
            options = options | self._place(self._models.index(functions[0]))
        elif self._place_worker is not None:
            options = options | self._place_worker(number)
        if is_model and self._place is None:
            options = options | {"runtime_env": {"env_vars": inherited_env() | device_env("cpu")}}
        actor_class: Any = RewardWorker
        threads = dict.fromkeys(actor_class.concurrency_groups, 1)
        rank = next(n for n in itertools.count() if f"reward worker {n}" not in self._actors)
        options = options | {"name": name_in_ray("reward", rank)}
        actor = ray.remote(concurrency_groups=threads, **options)(actor_class).remote()
        started = actor.start.remote(replace(self._settings, functions=functions), concurrent)
        self._actors[f"reward worker {rank}"] = actor, started
        return actor, started

    def watched(self) -> list[Watched]:
        """The actors that have not been killed."""
        actors = list(self._actors.items())
        return [Watched(name, actor, not all_ready([start])) for name, (actor, start) in actors]

    def score(self, process: ActorHandle, request: ScoreRequest) -> ray.ObjectRef:
        """Send a request."""
        return process.score.remote(request)

    def wait(self, references: Sequence[ray.ObjectRef], timeout_s: float) -> list[ray.ObjectRef]:
        """The references that are done; waits at most `timeout_s` for the first."""
        any_ready(references, timeout_s=timeout_s)
        return all_ready(references)

    def result(self, reference: ray.ObjectRef) -> Any:
        """The result of a reference that is done; `Failed` if its actor ended."""
        try:
            return ray.get(reference, timeout=FETCH_S)
        except RayError as error:
            return Failed("crashed", str(error).strip().partition("\n")[0])

    def whereabouts(self, process: ActorHandle) -> str:
        """The stack of the reward process's main thread, which its actor reads."""
        try:
            return ray.get(process.whereabouts.remote(), timeout=2 * ANSWER_S)
        except RayError:
            return ""

    def kill(self, process: ActorHandle) -> None:
        """End the actor; the guard of its reward process ends that and what it started."""
        self._actors = {n: one for n, one in self._actors.items() if one[0] is not process}
        ray.kill(process)


class RewardWorkers(GroupScorer):
    """Scores groups in Ray actors; `GroupScorer` says how."""

    def __init__(
        self,
        config: RewardConfig,
        *,
        run_values: dict[str, Any] | None = None,
        max_steps: int = 0,
        place: PlaceActor | None = None,
        place_worker: PlaceActor | None = None,
        plugins: Sequence[str] = (),
    ):
        """Load the plugins and check the functions; `start` starts the workers.

        Args:
            config: names, settings, plugins, number of workers, limits and policies.
            run_values: values of the run for parameters of these names, see `settings_of`.
            max_steps: of the run, for `trainer_state`.
            place: Ray options of the processes of reward models, by the model's number; None
                keeps them on the CPU.
            place_worker: Ray options of the other processes, by the number of processes that were
                started before; None leaves them to Ray.
            plugins: files to load before the plugins of `config`.

        Raises:
            ValueError: a plugin that cannot be imported, an unknown reward function, or weights
                that do not fit.
        """
        settings = process_settings(config, run_values or {}, plugins)
        load_plugins(settings.plugins)
        check_functions(config)
        backend = RayBackend(settings, config.models, place, place_worker)
        self.watched = backend.watched
        """The workers that have to give signs of life."""
        super().__init__(config, backend, max_steps=max_steps)
