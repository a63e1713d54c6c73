"""Reward workers: processes that score groups, and that can be killed when one hangs."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from rlsys.actors.group import ActorFailure, PhaseTimeout, get_all, get_one
from rlsys.config import RewardConfig
from rlsys.rewards import RewardError, RewardFunctions, check_names_and_weights, load_plugins
from rlsys.types import RewardOutput, RolloutGroup

START_TIMEOUT_S = 300.0
"""For processes to start and reward classes to load what they need, a model perhaps."""
WORKER_CPUS = 0.01
"""Ray's bookkeeping only: rewards share the cores with whatever is idle at the time."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Reward code raised. Told as text: its exceptions may not survive pickling."""

    report: str
    """The traceback of the user's own code, then one line that sums it up."""


class RewardWorker:
    """One process with its own instances of the reward functions."""

    def start(
        self, config: RewardConfig, known: dict[str, Any], plugins: Sequence[str]
    ) -> Failed | None:
        """Load the plugins and instantiate the reward functions."""
        load_plugins(plugins)
        try:
            self._functions = RewardFunctions(
                config.reward_funcs, config.reward_weights, config.reward_params, known
            )
        except RewardError as error:
            return Failed(_report(error))
        return None

    def score(self, group: RolloutGroup) -> list[RewardOutput] | Failed:
        """[G] the rewards of a group."""
        try:
            return self._functions.score(group)
        except RewardError as error:
            return Failed(_report(error))


@dataclass(frozen=True, slots=True)
class _Job:
    """A group that a worker is scoring now."""

    worker: int
    group: RolloutGroup
    deadline: float
    """On the clock of time.monotonic()."""


class RewardWorkers:
    """Scores groups in `num_workers` processes, each at most one group at a time.

    Use from one thread: `submit` groups as they finish, wait for `pending_refs` together with
    whatever else may happen, and `collect` at least every second or so, because it is `collect`
    that hands idle workers the next group and notices one that hangs.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        known: dict[str, Any] | None = None,
        env_vars: dict[str, str] | None = None,
    ):
        """Start the workers and wait until each has its reward functions.

        Args:
            config: names, weights, plugins, number of workers and time limit.
            known: values of the run for parameters of these names, see `settings_of`.
            env_vars: environment of the worker processes, besides their inherited one.

        Raises:
            ValueError: a plugin that cannot be imported, an unknown reward function, or weights
                that do not fit; found before any process starts.
            ActorFailure: a reward class that cannot be instantiated.
        """
        self.config = config
        plugins = [str(Path(path).expanduser().resolve()) for path in config.external_plugins]
        load_plugins(plugins)
        check_names_and_weights(config.reward_funcs, config.reward_weights)
        self._queue: deque[RolloutGroup] = deque()
        self._jobs: dict[ray.ObjectRef, _Job] = {}
        runtime_env = {"env_vars": env_vars or {}}
        actor_class: Any = ray.remote(num_cpus=WORKER_CPUS, runtime_env=runtime_env)(RewardWorker)
        self._workers: list[ActorHandle] = [actor_class.remote() for _ in range(config.num_workers)]
        self._idle = deque(range(config.num_workers))
        refs = {
            _name(index): worker.start.remote(config, known or {}, plugins)
            for index, worker in enumerate(self._workers)
        }
        try:
            _raise_failed(get_all(refs, phase="start-up", timeout_s=START_TIMEOUT_S))
        except Exception:
            self.close()
            raise

    @property
    def num_pending(self) -> int:
        """Groups submitted and not collected yet."""
        return len(self._queue) + len(self._jobs)

    def submit(self, group: RolloutGroup) -> None:
        """Have `group` scored, as soon as a worker is idle."""
        self._queue.append(group)
        self._dispatch()

    def pending_refs(self) -> list[ray.ObjectRef]:
        """For `ray.wait`: one of them is ready when `collect` has something to return."""
        return list(self._jobs)

    def collect(self) -> list[RolloutGroup]:
        """The groups scored by now, with their rewards, in the order in which they were begun.

        Raises:
            ActorFailure: reward code raised (its own traceback is in the message) or its process
                died.
            PhaseTimeout: a group took longer than `timeout_s`; its worker has been killed.
        """
        if not self._jobs:
            return []
        refs: list[ray.ObjectRef] = list(self._jobs)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        scored = [self._finish(ref) for ref in ready]
        self._kill_overdue()
        self._dispatch()
        return scored

    def close(self) -> None:
        """End the worker processes, whatever they are doing."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()
        self._jobs.clear()
        self._queue.clear()

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            index, group = self._idle.popleft(), self._queue.popleft()
            ref: ray.ObjectRef = self._workers[index].score.remote(group)
            self._jobs[ref] = _Job(index, group, time.monotonic() + self.config.timeout_s)

    def _finish(self, ref: ray.ObjectRef) -> RolloutGroup:
        job = self._jobs.pop(ref)
        outcome = get_one(ref, name=_name(job.worker), phase=self._phase(job))
        _raise_failed([outcome])
        self._idle.append(job.worker)
        return replace(job.group, rewards=outcome)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for job in self._jobs.values():
            if now > job.deadline:
                ray.kill(self._workers[job.worker])
                raise PhaseTimeout(
                    f"{_name(job.worker)} was killed: {self._phase(job)} took longer than "
                    f"reward.timeout_s = {self.config.timeout_s:g} s. Look for a loop without end "
                    "or a wait without limit in the reward code, or raise the limit."
                )

    def _phase(self, job: _Job) -> str:
        names = ", ".join(self.config.reward_funcs)
        return f"scoring prompt {job.group.prompt.prompt_id!r} with {names}"


def _name(index: int) -> str:
    return f"reward worker {index}"


def _raise_failed(outcomes: Sequence[object]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            raise ActorFailure(outcome.report)


def _report(error: RewardError) -> str:
    cause = error.__cause__
    if cause is None or cause.__traceback__ is None:
        return str(error)
    # Without the first frame, which is rlsys calling the user's code.
    lines = traceback.format_exception(type(cause), cause, cause.__traceback__.tb_next)
    return f"{''.join(lines)}\n{error}"
