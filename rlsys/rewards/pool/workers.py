"""Worker pools: processes that run the same reward functions, are killed and started again."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlsys.config import RewardConfig
from rlsys.rewards.base import orms
from rlsys.rewards.pool.failures import RewardCodeError
from rlsys.rewards.pool.job import Job
from rlsys.rewards.pool.serve import Failed, ScoreRequest
from rlsys.rewards.scoring import Scored, is_async
from rlsys.timeline.spans import Timeline

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""Seconds for a process to start and its reward classes to load, a model perhaps."""
MAX_ASYNC_JOBS = 256
"""Jobs of async functions that run at the same time."""
MAX_MODEL_JOBS = 4
"""Jobs of a reward model at the same time: enough to fill its batches. A job's time runs while it
waits for its turn in the model's process, but not while it waits here."""
ASYNC_GRACE_S = 5.0
"""An async function that ignores its cancellation for this long blocks its event loop: killed."""


class Backend(Protocol):
    """Starts reward processes: as Ray actors in a run, as children in `rlsys rewards try`.

    A reference stands for a result that is on its way.
    """

    def spawn(self, functions: Sequence[str], *, concurrent: bool) -> tuple[Any, Any]:
        """Start a process; returns its handle and the reference of its start's result.

        Args:
            functions: names of the reward functions that it runs.
            concurrent: whether it runs many jobs together, of async functions.
        """

    def score(self, process: Any, request: ScoreRequest) -> Any:
        """Send a request; returns the reference of its `Scored` or `Failed`."""

    def wait(self, references: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """The references that are done; at least one unless `timeout_s` passes first."""

    def result(self, reference: Any) -> Any:
        """The result of a reference that is done; `Failed` "crashed" if its process ended."""

    def whereabouts(self, process: Any) -> str:
        """The stack of a process's main thread; empty if it cannot be learned soon."""

    def kill(self, process: Any) -> None:
        """End a process whatever it is doing, dead or not."""


@dataclass(slots=True)
class Worker:
    """A reward process and what it is doing."""

    name: str
    """Its place; one that replaces another has the same."""
    handle: Any
    starting: Any
    """Reference of its start; None when it is ready."""
    start_deadline: float
    """On the clock of time.monotonic()."""
    running: dict[Any, tuple[Job, float]] = field(default_factory=dict)
    """Reference -> job and deadline on the clock of time.monotonic()."""
    warm: set[str] = field(default_factory=set)
    """Functions that returned values here: what they load at their first call is loaded."""


class WorkerPool:
    """Processes that make and run the same functions, and the jobs that wait for them.

    Functions are split over pools because a process makes all functions of its pool, and some are
    large. A process that hangs, dies or needs too much memory is killed and replaced.
    """

    def __init__(
        self,
        backend: Backend,
        functions: Sequence[str],
        timeout_s: float,
        *,
        concurrent: bool = True,
        num_workers: int = 1,
        max_jobs: int = 1,
        name: str = "reward worker",
    ):
        """Describe the pool; `start` starts its processes.

        Args:
            backend: starts the processes.
            functions: names of the reward functions.
            timeout_s: time that a function's first call in a process gets.
            concurrent: whether the functions are async and run together.
            num_workers: processes.
            max_jobs: jobs that one process runs at the same time.
            name: of a process in the timeline, before its number.
        """
        self.functions = tuple(functions)
        self.concurrent = concurrent
        self.num_workers = num_workers
        self.max_jobs = max_jobs
        self.name = name
        self.waiting: deque[Job] = deque()
        self._backend = backend
        self._timeout_s = timeout_s
        self._workers: list[Worker] = []
        self.timeline = Timeline()
        """Records which process calls which function; this one drops it."""

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        for number in range(self.num_workers):
            self._spawn(f"{self.name} {number}")

    @property
    def is_ready(self) -> bool:
        """Whether all processes have started."""
        return all(worker.starting is None for worker in self._workers)

    def references(self) -> list[Any]:
        """References of what runs or starts."""
        running = [reference for worker in self._workers for reference in worker.running]
        return running + [w.starting for w in self._workers if w.starting is not None]

    def collect(self, done: set[Any]) -> list[tuple[Job, Scored | Failed]]:
        """Take what is done; replace processes that died or are overdue.

        Raises:
            RewardCodeError: a process did not start.
        """
        finished: list[tuple[Job, Scored | Failed]] = []
        for worker in list(self._workers):
            if worker.starting is not None:
                self._check_start(worker, done)
                continue
            failed = None
            for reference in [r for r in worker.running if r in done]:
                outcome = self._backend.result(reference)
                if isinstance(outcome, Failed) and outcome.kind == "crashed":
                    failed = outcome
                    continue
                job, _ = worker.running.pop(reference)
                if isinstance(outcome, Scored):
                    worker.warm.add(job.function)
                finished.append((job, outcome))
            now = time.monotonic()
            if failed is None and any(now > deadline for _, deadline in worker.running.values()):
                failed = Failed("timeout", self._backend.whereabouts(worker.handle))
            if failed is not None:
                finished += self._replace(worker, failed)
            self._note(worker)
        return finished

    def _note(self, worker: Worker) -> None:
        """Tell the timeline what a process works on: of several functions, the first."""
        jobs = [job.function for job, _ in worker.running.values()]
        self.timeline.now_doing(worker.name, "reward", jobs[0] if jobs else None)

    def dispatch(self) -> None:
        """Hand waiting jobs to processes that have room."""
        for worker in self._workers:
            while self.waiting and self._has_room(worker, self.waiting[0]):
                job = self.waiting.popleft()
                if job.function not in worker.warm:
                    # A share may be less than what the function loads at its first call; and one
                    # killed for that leaves the next completion a new process, to be killed too.
                    job = replace(job, timeout_s=self._timeout_s)
                reference = self._backend.score(worker.handle, job.request())
                limit = job.timeout_s + (ASYNC_GRACE_S if self.concurrent else 0.0)
                worker.running[reference] = (job, time.monotonic() + limit)
                self._note(worker)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            self._backend.kill(worker.handle)
        self._workers.clear()
        self.waiting.clear()

    def _spawn(self, name: str) -> None:
        handle, starting = self._backend.spawn(self.functions, concurrent=self.concurrent)
        self._workers.append(Worker(name, handle, starting, time.monotonic() + START_TIMEOUT_S))

    def _check_start(self, worker: Worker, done: set[Any]) -> None:
        if worker.starting not in done:
            if time.monotonic() > worker.start_deadline:
                raise RewardCodeError(
                    f"a reward process did not start within {START_TIMEOUT_S:g} s; look at what "
                    "the constructors of its reward functions wait for, such as a server that is "
                    "down or a lock that a killed process left: "
                    + ", ".join(map(repr, self.functions))
                )
            return
        outcome = self._backend.result(worker.starting)
        if isinstance(outcome, Failed):
            report = outcome.report
            if outcome.kind == "crashed":
                report += (
                    "\na reward process died while its reward functions were made. If they hold "
                    "much memory, a model perhaps, raise reward.max_memory_mb"
                )
            raise RewardCodeError(report)
        worker.starting = None

    def _replace(self, worker: Worker, failed: Failed) -> list[tuple[Job, Scored | Failed]]:
        """Kill a process and start another; returns the job that is to blame, if it is known."""
        self._backend.kill(worker.handle)
        self._workers.remove(worker)
        self._spawn(worker.name)
        jobs = [job for job, _ in worker.running.values()]
        worker.running.clear()
        # What kills a process when it is tried alone is said elsewhere.
        if failed.kind == "crashed" and all(job.retry is None for job in jobs):
            functions = ", ".join(map(repr, self.functions))
            why = failed.report.partition("\n")[0]
            logger.warning(
                "note: a process of %s failed in scoring and is replaced: %s", functions, why
            )
        if len(jobs) == 1:
            return [(jobs[0], failed)]
        # One of several is to blame: each is tried with no other beside it.
        self.waiting.extendleft(
            replace(job, exclusive=True) for job in reversed(jobs) if not job.pending.is_forgotten
        )
        return []

    def _has_room(self, worker: Worker, job: Job) -> bool:
        if worker.starting is not None:
            return False
        if job.exclusive or not self.concurrent:
            return not worker.running
        exclusive = any(running.exclusive for running, _ in worker.running.values())
        return not exclusive and len(worker.running) < self.max_jobs


def make_pools(config: RewardConfig, backend: Backend) -> list[WorkerPool]:
    """The pools of a run: one for sync functions, one for async ones, one for each reward model."""
    others = [name for name in config.names if name not in config.models]
    sync = [name for name in others if not is_async(orms[name])]
    waiting = [name for name in others if is_async(orms[name])]
    limit = config.timeout_s
    pools = [
        WorkerPool(backend, sync, limit, concurrent=False, num_workers=config.num_workers),
        WorkerPool(backend, waiting, limit, max_jobs=MAX_ASYNC_JOBS, name="async reward worker"),
        *(
            WorkerPool(backend, [name], limit, max_jobs=MAX_MODEL_JOBS, name=f"reward model {name}")
            for name in config.models
        ),
    ]
    return [pool for pool in pools if pool.functions]
