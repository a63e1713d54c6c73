"""Reward workers: Ray actors that score groups, and that can be killed when one hangs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from rlsys.actors.group import Place, device_env, inherited_env
from rlsys.config import RewardConfig
from rlsys.rewards import check_names_and_weights, load_plugins
from rlsys.rewards.pool import RewardPool
from rlsys.rewards.runner import (
    Failed,
    ProcessSettings,
    RewardRunner,
    Task,
    Values,
    process_settings,
)
from rlsys.rewards.work import ProcessDied

WORKER_CPUS = 0.01
"""Ray's bookkeeping only: rewards share the cores with whatever is idle at the time."""


class RewardWorker:
    """One process with its own instances of the reward functions; one task at a time."""

    def __init__(self) -> None:
        self._runner = RewardRunner()

    def start(self, settings: ProcessSettings) -> Failed | None:
        """Make the reward functions."""
        return self._runner.start(settings)

    def score(self, task: Task) -> Values | Failed:
        """Call one function for the completions of one prompt."""
        return self._runner.score(task)


class AsyncRewardWorker:
    """The same for async functions: many tasks at a time in one event loop."""

    def __init__(self) -> None:
        self._runner = RewardRunner()

    async def start(self, settings: ProcessSettings) -> Failed | None:
        """Make the reward functions."""
        return self._runner.start(settings)

    async def score(self, task: Task) -> Values | Failed:
        """Call one async function for the completions of one prompt."""
        return await self._runner.score_async(task)


class RayBackend:
    """Reward processes as Ray actors; see `rlsys.rewards.work.Backend`."""

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
        actor_class: Any = AsyncRewardWorker if concurrent else RewardWorker
        options = self._options
        if names[0] in self._models and self._place is not None:
            options = options | self._place(self._models.index(names[0]))
        elif names[0] in self._models:
            options = options | {"runtime_env": {"env_vars": inherited_env() | device_env("cpu")}}
        actor = ray.remote(**options)(actor_class).remote()
        return actor, actor.start.remote(replace(self._settings, names=names))

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
            return ray.get(reference)
        except RayError as error:
            raise ProcessDied(str(error).strip().partition("\n")[0]) from None

    def kill(self, process: ActorHandle) -> None:
        """End the actor's process."""
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
    ):
        """Start the workers and wait until each has its reward functions.

        Args:
            config: names, settings, plugins, number of workers, limits and policies.
            known: values of the run for parameters of these names, see `settings_of`.
            max_steps: of the run, for `trainer_state`.
            place: Ray options of the processes of reward models, by the model's number; None
                keeps them on the CPU.

        Raises:
            ValueError: a plugin that cannot be imported, an unknown reward function, or weights
                that do not fit; found before any process starts.
            RewardCodeError: a reward class that cannot be instantiated.
        """
        load_plugins(config.external_plugins)
        check_names_and_weights(config.names, config.reward_weights)
        settings = process_settings(config, known or {})
        backend = RayBackend(settings, config.models, place)
        super().__init__(config, backend, max_steps=max_steps)
