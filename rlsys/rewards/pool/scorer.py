"""Scoring groups in processes that are killed when reward code hangs or leaks.

A job is one reward function on the completions of one prompt. When it fails, each completion is
tried alone, so that a completion that makes a function hang or crash does not cost its siblings
their rewards. Functions that are not async run one at a time in each of `num_workers` processes;
async ones run together in the event loop of one process.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from rlsys.config import RewardConfig
from rlsys.config.gates import Gate, parse_gates
from rlsys.rewards.base import TrainerState
from rlsys.rewards.instances import Params
from rlsys.rewards.pool.failures import FailurePolicy, RewardCodeError
from rlsys.rewards.pool.job import Job, PendingGroup, Retry
from rlsys.rewards.pool.process import LocalBackend
from rlsys.rewards.pool.serve import Failed, process_settings
from rlsys.rewards.pool.workers import Backend, make_pools
from rlsys.rewards.scoring import Scored, weighted_total
from rlsys.timeline.spans import Timeline
from rlsys.types import RewardOutput, RolloutGroup

MIN_ALONE_S = 1.0
"""Least time that a completion gets when it is tried alone, after a function's first call."""


class GroupScorer:
    """Scores groups; used from one thread.

    `submit` groups as they finish, wait for `pending_refs` together with whatever else may happen,
    and `collect` at least every second or so: it hands out jobs and kills what hangs. Every pending
    group has its own ticket.

    A group takes `timeout_s` for each function and, if that fails, an equal share for each
    completion, at least a second. A completion that is a function's first in a new process gets
    `timeout_s`. Worst case: (1 + G) * timeout_s per function, when each completion alone is killed;
    process starts come on top.
    """

    def __init__(
        self, config: RewardConfig, backend: Backend, *, max_steps: int = 0, in_run: bool = True
    ):
        """Describe the pools; `start` starts their processes.

        Args:
            config: the functions and their limits.
            backend: starts the processes.
            max_steps: steps of the run, for functions that ask.
            in_run: True in a run; False lets the log say what a run would do.
        """
        self._config = config
        self._backend = backend
        self._max_steps = max_steps
        self._gates: dict[str, Gate] = parse_gates(config.gate)
        self._weights = config.reward_weights or [1.0] * len(config.names)
        self._policy = FailurePolicy(config, in_run=in_run)
        self.seconds = dict.fromkeys(config.names, 0.0)
        """Spent in each function so far."""
        self._pending: dict[int, PendingGroup] = {}
        """By ticket: submitted, and neither collected nor forgotten yet."""
        self._scored: list[RolloutGroup] = []
        self._pools = make_pools(config, backend)
        self._pool_of = {name: pool for pool in self._pools for name in pool.functions}

    def start(self) -> None:
        """Start the processes and wait until each has its reward functions.

        Raises:
            RewardCodeError: a class could not be instantiated, or not within START_TIMEOUT_S.
        """
        try:
            for pool in self._pools:
                pool.start()
            while not all(pool.is_ready for pool in self._pools):
                self.wait(1.0)
                self.collect()
        except BaseException:
            self.close()
            raise

    @property
    def timeline(self) -> Timeline:
        """Records which process calls which function; by default it drops that."""
        return self._pools[0].timeline

    @timeline.setter
    def timeline(self, timeline: Timeline) -> None:
        for pool in self._pools:
            pool.timeline = timeline

    @property
    def num_pending(self) -> int:
        """Groups submitted, and neither collected nor forgotten yet."""
        return len(self._pending)

    def submit(self, group: RolloutGroup) -> None:
        """Have `group` scored, as soon as a process is idle."""
        assert group.ticket not in self._pending, f"group {group.ticket} is pending already"
        size = len(group.completions)
        updates = max((v for c in group.completions for v in c.policy_versions), default=0)
        state = TrainerState(updates, self._max_steps)
        values = {name: [math.nan] * size for name in self._config.names}
        pending = PendingGroup(group, state, values, failures=[{} for _ in range(size)])
        self._pending[group.ticket] = pending
        self._enqueue(pending, {n: range(size) for n in values if n not in self._gates})
        self._dispatch()

    def forget(self, tickets: Collection[int]) -> None:
        """Never return these groups; unknown ids do not matter.

        A function that works on one may go on to its end, since stopping it costs a process; what
        it returns and whether it fails is ignored.
        """
        for ticket in tickets:
            if (pending := self._pending.pop(ticket, None)) is not None:
                pending.is_forgotten = True
        for pool in self._pools:
            kept = [job for job in pool.waiting if not job.pending.is_forgotten]
            pool.waiting.clear()
            pool.waiting.extend(kept)
        self._scored = [group for group in self._scored if group.ticket in self._pending]

    def pending_refs(self) -> list[Any]:
        """References for the backend's wait: when one is done there may be groups to collect."""
        return [reference for pool in self._pools for reference in pool.references()]

    def collect(self) -> list[RolloutGroup]:
        """The groups scored by now, with their rewards.

        Raises:
            RewardCodeError: reward code failed and the policy for that is "raise"; its own
                traceback is in the message. Or a process did not start.
        """
        references = self.pending_refs()
        done = set(self._backend.wait(references, 0.0)) if references else set()
        for pool in self._pools:
            for job, outcome in pool.collect(done):
                self._finish(job, outcome)
        self._dispatch()
        scored, self._scored = self._scored, []
        for group in scored:
            del self._pending[group.ticket]
        return scored

    def wait(self, timeout_s: float) -> None:
        """Sleep until something may be collected."""
        if references := self.pending_refs():
            self._backend.wait(references, timeout_s)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for pool in self._pools:
            pool.close()
        self._scored.clear()
        self._pending.clear()

    def _dispatch(self) -> None:
        for pool in self._pools:
            pool.dispatch()

    def _enqueue(self, pending: PendingGroup, indexes_of: dict[str, Iterable[int]]) -> None:
        for name, indexes in indexes_of.items():
            if chosen := tuple(indexes):
                pending.open_jobs += 1
                job = Job(pending, name, chosen, self._config.timeout_s)
                self._pool_of[name].waiting.append(job)
        if not pending.open_jobs:
            self._next_stage(pending)

    def _finish(self, job: Job, outcome: Scored | Failed) -> None:
        if isinstance(outcome, Scored):
            self.seconds[job.function] += outcome.seconds
        if job.pending.is_forgotten:
            return
        if isinstance(outcome, Failed):
            self._failed(job, outcome)
            return
        for index, value in zip(job.indexes, outcome.values, strict=True):
            job.pending.values[job.function][index] = value
        for index, logged in zip(job.indexes, outcome.logged, strict=False):
            job.pending.logged[job.function, index] = logged
        self._close(job)

    def _failed(self, job: Job, failed: Failed) -> None:
        """Try each completion alone, or, where that was done, give the failure its score."""
        # An exception comes again; a process may have died for a reason of its own.
        again = len(job.indexes) > 1 or failed.kind != "error"
        if job.retry is None and failed.splittable and again:
            self._try_alone(job, failed)
            return
        policy = self._policy.choose(failed.kind)
        if policy == "raise":
            raise RewardCodeError(self._policy.describe(job, failed.kind, failed.report))
        self._policy.log(job, failed.kind, failed.report)
        for index in job.indexes:
            job.pending.failures[index][job.function] = failed.kind
            job.pending.values[job.function][index] = 0.0 if policy == "zero" else math.nan
        if job.retry is not None:
            job.retry.num_failed += 1
        self._close(job)

    def _try_alone(self, job: Job, failed: Failed) -> None:
        pool = self._pool_of[job.function]
        share = max(job.timeout_s / len(job.indexes), MIN_ALONE_S)
        # Async functions are tried at the same time, so none has to share.
        limit = job.timeout_s if pool.concurrent else min(job.timeout_s, share)
        retry = Retry(failed.kind, failed.report, len(job.indexes))
        job.pending.open_jobs += len(job.indexes) - 1
        pool.waiting.extendleft(
            replace(job, indexes=(index,), timeout_s=limit, retry=retry)
            for index in reversed(job.indexes)
        )

    def _close(self, job: Job) -> None:
        pending, retry = job.pending, job.retry
        if retry is not None:
            retry.num_open -= 1
            all_passed = retry.num_open == 0 and retry.num_failed == 0
            if all_passed and self._policy.choose(retry.kind) == "raise":
                indexes = tuple(range(len(pending.rollout_group.completions)))
                together = replace(job, indexes=indexes, retry=None)
                raise RewardCodeError(self._policy.describe(together, retry.kind, retry.report))
        pending.open_jobs -= 1
        if pending.open_jobs == 0:
            self._next_stage(pending)

    def _next_stage(self, pending: PendingGroup) -> None:
        """Call the functions behind gates, or finish the group."""
        if self._gates and not pending.gates_passed:
            pending.gates_passed = True
            chosen: dict[str, Iterable[int]] = {}
            for name, gate in self._gates.items():
                passed = [gate.lets_pass(value) for value in pending.values[gate.by]]
                pending.values[name] = [math.nan if p else 0.0 for p in passed]
                chosen[name] = [index for index, p in enumerate(passed) if p]
            self._enqueue(pending, chosen)
            return
        self._scored.append(replace(pending.rollout_group, rewards=self._rewards(pending)))

    def _rewards(self, pending: PendingGroup) -> list[RewardOutput]:
        rewards = []
        rows = zip(zip(*pending.values.values(), strict=True), pending.failures, strict=True)
        for index, (row, failures) in enumerate(rows):
            total = weighted_total(row, self._weights)
            if any(self._policy.choose(kind) == "drop" for kind in failures.values()):
                total = math.nan
            by_name = dict(zip(pending.values, row, strict=True))
            rewards.append(RewardOutput(total, by_name, failures, *pending.logged_about(index)))
        return rewards


def local_scorer(
    config: RewardConfig,
    run_values: Params | None = None,
    *,
    plugins: Sequence[str] = (),
    max_steps: int = 0,
    in_run: bool = True,
) -> GroupScorer:
    """A started scorer whose processes are children of this one: scores as a run does, without Ray.

    Args:
        config, max_steps, in_run: see `GroupScorer`.
        run_values, plugins: see `process_settings`.

    Raises:
        RewardCodeError: see `GroupScorer.start`.
    """
    backend = LocalBackend(process_settings(config, run_values or {}, plugins))
    scorer = GroupScorer(config, backend, max_steps=max_steps, in_run=in_run)
    scorer.start()
    return scorer
