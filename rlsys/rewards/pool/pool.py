"""Scoring in processes that are killed when reward code hangs or leaks, and started again.

A task is one reward function on the completions of one prompt. When it fails, each completion is
tried alone, so that one that makes a function hang or crash does not cost its siblings their
reward. Functions that are not async run one at a time in each of `num_workers` processes; async
ones run together in the event loop of a process of their own.

A `Backend` starts the processes and talks to them: through Ray actors in a run, directly in
`rlsys rewards try`. The processes are the same, see `rlsys.rewards.pool.process`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from rlsys.config import RewardConfig
from rlsys.config.gates import Gate, parse_gates
from rlsys.rewards.base import TrainerState, orms
from rlsys.rewards.pool.failures import Failures, RewardCodeError
from rlsys.rewards.pool.runner import Failed, Values
from rlsys.rewards.pool.work import Backend, Group, Lane, Part, Process, ProcessDied, Trial, task_of
from rlsys.rewards.scoring import is_async, weighted_total
from rlsys.types import RewardFailure, RewardOutput, RolloutGroup

START_TIMEOUT_S = 300.0
"""For a process to start and its reward classes to load what they need, a model perhaps."""
MIN_ALONE_S = 1.0
"""Least time that a completion gets when it is tried alone, after a function's first call."""
MAX_ASYNC_TASKS = 256
"""Groups of completions that async functions work on at the same time."""
MAX_MODEL_TASKS = 4
"""The same of a reward model: enough to fill its batches. A group's time runs while it waits for
its turn in the model's process, and here it does not."""
ASYNC_GRACE_S = 5.0
"""An async function that ignores its cancellation for so long blocks its event loop: killed."""


def make_lanes(config: RewardConfig) -> list[Lane]:
    """The functions by the processes that run them: sync ones, async ones, each reward model."""
    others = [name for name in config.names if name not in config.models]
    sync = tuple(name for name in others if not is_async(orms[name]))
    waiting = tuple(name for name in others if is_async(orms[name]))
    lanes = [
        Lane(sync, concurrent=False, num_processes=config.num_workers),
        Lane(waiting, concurrent=True, max_tasks=MAX_ASYNC_TASKS),
        *(Lane((name,), concurrent=True, max_tasks=MAX_MODEL_TASKS) for name in config.models),
    ]
    return [lane for lane in lanes if lane.names]


class RewardPool:
    """Scores groups; from one thread.

    `submit` groups as they finish, wait for `pending_refs` together with whatever else may happen,
    and `collect` at least every second or so: it hands out tasks and kills what hangs. A group's
    group_id tells it apart from all others that are pending.

    A group takes `timeout_s` for each function and, if that fails, an equal share of it for each
    completion, at least a second. A completion that is a function's first in a new process gets
    `timeout_s`, so the bound is 1 + G times `timeout_s`, reached where each alone is killed,
    besides the time in which processes start.
    """

    def __init__(
        self, config: RewardConfig, backend: Backend, *, max_steps: int = 0, in_run: bool = True
    ):
        """Start the processes and wait until each has its reward functions.

        Args:
            config: The functions and what they may take.
            backend: Makes the processes.
            max_steps: Of the run, for functions that ask.
            in_run: Whether failures are those of a run; false tells what a run would make of them.

        Raises:
            RewardCodeError: a class could not be instantiated, or not within START_TIMEOUT_S.
        """
        self._config = config
        self._backend = backend
        self._max_steps = max_steps
        self._gates: dict[str, Gate] = parse_gates(config.gate)
        names = config.names
        self._weights = (
            [1.0] * len(names) if config.reward_weights is None else config.reward_weights
        )
        lanes = make_lanes(config)
        self._lane = {name: lane for lane in lanes for name in lane.names}
        self.seconds = dict.fromkeys(names, 0.0)
        """Spent in each function so far."""
        self._groups: dict[int, Group] = {}
        """By group_id: submitted, and neither collected nor forgotten yet."""
        self._waiting: dict[Lane, deque[Part]] = {lane: deque() for lane in lanes}
        self._scored: list[RolloutGroup] = []
        self._failures = Failures(config, in_run=in_run)
        self._processes: list[Process] = []
        try:
            for lane in lanes:
                for _ in range(lane.num_processes):
                    self._spawn(lane)
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def num_pending(self) -> int:
        """Groups submitted, and neither collected nor forgotten yet."""
        return len(self._groups)

    def submit(self, group: RolloutGroup) -> None:
        """Have `group` scored, as soon as a process is idle."""
        assert group.group_id not in self._groups, f"group {group.group_id} is pending already"
        size = len(group.completions)
        updates = max((v for c in group.completions for v in c.policy_versions), default=0)
        state = TrainerState(updates, self._max_steps)
        values = {name: [math.nan] * size for name in self._config.names}
        entry = Group(group, state, values, failures=[{} for _ in range(size)])
        self._groups[group.group_id] = entry
        self._enqueue(entry, {n: range(size) for n in values if n not in self._gates})
        self._dispatch()

    def forget(self, group_ids: Collection[int]) -> None:
        """Never return these groups; those that are unknown do not matter.

        A function that works on one may go on to its end, since stopping it costs a process; what
        it returns and whether it fails is ignored.
        """
        for group_id in group_ids:
            self._groups.pop(group_id, None)
        for lane, queue in self._waiting.items():
            self._waiting[lane] = deque(filter(self._is_wanted, queue))
        self._scored = [group for group in self._scored if group.group_id in self._groups]

    def pending_refs(self) -> list[Any]:
        """For the backend's wait: one of them is done when there may be something to collect."""
        running = [reference for process in self._processes for reference in process.parts]
        return running + [p.starting for p in self._processes if p.starting is not None]

    def collect(self) -> list[RolloutGroup]:
        """The groups scored by now, with their rewards.

        Raises:
            RewardCodeError: reward code failed and the policy for that is "raise"; its own
                traceback is in the message. Or a process that took the place of another did not
                start.
        """
        references = self.pending_refs()
        done = set(self._backend.wait(references, 0.0)) if references else set()
        for process in list(self._processes):
            self._look_at(process, done)
        self._dispatch()
        scored, self._scored = self._scored, []
        for group in scored:
            del self._groups[group.group_id]
        return scored

    def wait(self, timeout_s: float) -> None:
        """Sleep until something may be collected."""
        if references := self.pending_refs():
            self._backend.wait(references, timeout_s)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            self._backend.kill(process.handle)
        self._processes.clear()
        for queue in self._waiting.values():
            queue.clear()
        self._scored.clear()
        self._groups.clear()

    # --- processes -------------------------------------------------------------------------------

    def _spawn(self, lane: Lane) -> None:
        handle, starting = self._backend.spawn(lane.names, concurrent=lane.concurrent)
        deadline = time.monotonic() + START_TIMEOUT_S
        self._processes.append(Process(handle, starting, lane, deadline))

    def _replace(self, process: Process) -> None:
        """Kill a process and start another in the background; the others go on."""
        self._backend.kill(process.handle)
        self._processes.remove(process)
        self._spawn(process.lane)

    def _wait_until_ready(self) -> None:
        while starting := [p for p in self._processes if p.starting is not None]:
            done = set(self._backend.wait([p.starting for p in starting], 1.0))
            for process in starting:
                self._look_at(process, done)

    def _started(self, process: Process) -> None:
        try:
            outcome = self._backend.result(process.starting)
        except ProcessDied as death:
            raise RewardCodeError(
                f"{death}\na reward process died while its reward functions were made. If they "
                "hold much memory, a model perhaps, raise reward.max_memory_mb"
            ) from None
        if isinstance(outcome, Failed):
            raise RewardCodeError(outcome.report)
        process.starting = None

    def _look_at(self, process: Process, done: set[Any]) -> None:
        """Take what a process has done; replace it when it died or is overdue."""
        if process.starting is not None:
            if process.starting in done:
                self._started(process)
            elif time.monotonic() > process.start_deadline:
                raise RewardCodeError(
                    f"a reward process did not start within {START_TIMEOUT_S:g} s; look at what "
                    "the constructors of its reward functions wait for, such as a server that is "
                    "down or a lock that a killed process left: "
                    + ", ".join(map(repr, process.lane.names))
                )
            return
        death = None
        for reference in [r for r in process.parts if r in done]:
            try:
                outcome = self._backend.result(reference)
            except ProcessDied as error:
                death = error
                continue
            part, _ = process.parts.pop(reference)
            if isinstance(outcome, Values):
                process.warm.add(part.name)
                self.seconds[part.name] += outcome.seconds
            if self._is_wanted(part):
                self._finish(part, outcome)
        if death is not None:
            self._died(process, "crashed", str(death))
        elif any(time.monotonic() > deadline for _, deadline in process.parts.values()):
            self._died(process, "timeout", "killed")

    def _died(self, process: Process, kind: RewardFailure, why: str) -> None:
        parts = [part for part, _ in process.parts.values()]
        self._replace(process)
        wanted = [part for part in parts if self._is_wanted(part)]
        if len(parts) > 1:
            # One of several is to blame: each is tried with no other beside it.
            self._waiting[process.lane].extendleft(
                replace(part, exclusive=True) for part in reversed(wanted)
            )
        elif wanted:
            self._failed(wanted[0], kind, why)

    # --- tasks -----------------------------------------------------------------------------------

    def _is_wanted(self, part: Part) -> bool:
        return self._groups.get(part.group.group.group_id) is part.group

    def _enqueue(self, entry: Group, indexes_by_name: dict[str, Iterable[int]]) -> None:
        for name, indexes in indexes_by_name.items():
            chosen = tuple(indexes)
            if chosen:
                entry.open_tasks += 1
                part = Part(entry, name, chosen, self._config.timeout_s)
                self._waiting[self._lane[name]].append(part)
        if not entry.open_tasks:
            self._next_stage(entry)

    def _dispatch(self) -> None:
        for process in self._processes:
            queue = self._waiting[process.lane]
            while queue and self._has_room(process, queue[0]):
                part = queue.popleft()
                if part.name not in process.warm:
                    # A share may be less than what the function loads at its first call; and one
                    # killed for that leaves the next completion a new process, to be killed too.
                    part = replace(part, timeout_s=self._config.timeout_s)
                reference = self._backend.score(process.handle, task_of(part))
                limit = part.timeout_s + (ASYNC_GRACE_S if process.lane.concurrent else 0.0)
                process.parts[reference] = (part, time.monotonic() + limit)

    def _has_room(self, process: Process, part: Part) -> bool:
        if process.starting is not None:
            return False
        if part.exclusive or not process.lane.concurrent:
            return not process.parts
        exclusive = any(running.exclusive for running, _ in process.parts.values())
        return not exclusive and len(process.parts) < process.lane.max_tasks

    def _finish(self, part: Part, outcome: Values | Failed) -> None:
        if isinstance(outcome, Values):
            for index, value in zip(part.indexes, outcome.values, strict=True):
                part.group.values[part.name][index] = value
            for index, logged in zip(part.indexes, outcome.logged, strict=False):
                part.group.logged[part.name, index] = logged
            self._close(part)
        else:
            self._failed(part, outcome.kind, outcome.report, splittable=outcome.splittable)

    def _failed(
        self, part: Part, kind: RewardFailure, report: str, *, splittable: bool = True
    ) -> None:
        """Try each completion alone, or, where that was done, give the failure its score."""
        # An exception comes again; a process may have died for a reason of its own.
        again = len(part.indexes) > 1 or kind != "error"
        if part.trial is None and splittable and again:
            self._try_alone(part, kind, report)
            return
        policy = self._failures.policy(kind)
        if policy == "raise":
            raise RewardCodeError(self._failures.story(part, kind, report))
        self._failures.tell(part, kind, report, policy)
        for index in part.indexes:
            part.group.failures[index][part.name] = kind
            part.group.values[part.name][index] = 0.0 if policy == "zero" else math.nan
        if part.trial is not None:
            part.trial.num_failed += 1
        self._close(part)

    def _try_alone(self, part: Part, kind: RewardFailure, report: str) -> None:
        shared = max(part.timeout_s / len(part.indexes), MIN_ALONE_S)
        # Async functions are tried at the same time, so none has to share.
        lane = self._lane[part.name]
        limit = part.timeout_s if lane.concurrent else min(part.timeout_s, shared)
        trial = Trial(kind, report, len(part.indexes))
        part.group.open_tasks += len(part.indexes) - 1
        self._waiting[lane].extendleft(
            replace(part, indexes=(index,), timeout_s=limit, trial=trial)
            for index in reversed(part.indexes)
        )

    def _close(self, part: Part) -> None:
        if part.trial is not None:
            part.trial.num_open -= 1
            blameless = part.trial.num_open == 0 and part.trial.num_failed == 0
            if blameless and self._failures.policy(part.trial.kind) == "raise":
                size = len(part.group.group.completions)
                together = replace(part, indexes=tuple(range(size)), trial=None)
                raise RewardCodeError(
                    self._failures.story(together, part.trial.kind, part.trial.report)
                )
        part.group.open_tasks -= 1
        if part.group.open_tasks == 0:
            self._next_stage(part.group)

    def _next_stage(self, entry: Group) -> None:
        """Call the functions behind a gate, or finish the group."""
        if self._gates and not entry.gated:
            entry.gated = True
            chosen: dict[str, Iterable[int]] = {}
            for name, gate in self._gates.items():
                passed = [gate.lets_pass(value) for value in entry.values[gate.by]]
                entry.values[name] = [math.nan if p else 0.0 for p in passed]
                chosen[name] = [index for index, p in enumerate(passed) if p]
            self._enqueue(entry, chosen)
            return
        self._scored.append(replace(entry.group, rewards=self._rewards(entry)))

    def _rewards(self, entry: Group) -> list[RewardOutput]:
        rewards = []
        rows = zip(zip(*entry.values.values(), strict=True), entry.failures, strict=True)
        for index, (row, failures) in enumerate(rows):
            total = weighted_total(row, self._weights)
            if any(self._failures.policy(kind) == "drop" for kind in failures.values()):
                total = math.nan
            by_name = dict(zip(entry.values, row, strict=True))
            rewards.append(RewardOutput(total, by_name, failures, *entry.logged_about(index)))
        return rewards
