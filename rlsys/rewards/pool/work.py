"""What a reward pool hands out: tasks of groups, and the processes that they run in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlsys.rewards.base import TrainerState
from rlsys.rewards.logged import Logged
from rlsys.rewards.pool.runner import Task
from rlsys.types import RewardFailure, RolloutGroup


class ProcessDied(Exception):
    """A reward process ended; the message says what is known of why."""


class Backend(Protocol):
    """Reward processes. A reference stands for a result that is on its way."""

    def spawn(self, names: Sequence[str], *, concurrent: bool) -> tuple[Any, Any]:
        """Start a process: its handle, and the reference of `RewardRunner.start`'s result.

        Args:
            names: Of the functions that it runs.
            concurrent: Whether it takes many tasks at once, of async functions.
        """

    def score(self, process: Any, task: Task) -> Any:
        """Send a task: the reference of its `Values` or `Failed`."""

    def wait(self, references: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Those that are done; at least one unless `timeout_s` passes first."""

    def result(self, reference: Any) -> Any:
        """Of a reference that is done.

        Raises:
            ProcessDied: its process ended.
        """

    def kill(self, process: Any) -> None:
        """End a process whatever it is doing, dead or not."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Functions that the same processes run, which makes no others: they may be large."""

    names: tuple[str, ...]
    concurrent: bool
    """Whether they are async and run together."""
    num_processes: int = 1
    max_tasks: int = 1
    """Groups that one process works on at the same time."""


@dataclass(slots=True)
class Group:
    """A group on its way through the reward functions."""

    group: RolloutGroup
    state: TrainerState
    values: dict[str, list[float]]
    """[G] by function, NaN until known."""
    open_tasks: int = 0
    failures: list[dict[str, RewardFailure]] = field(default_factory=list)
    """[G]"""
    logged: dict[tuple[str, int], Logged] = field(default_factory=dict)
    """By function and completion; of those that logged something."""
    gated: bool = False
    """Whether the functions behind a gate have been called."""

    def logged_about(self, index: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Columns and metrics of a completion; a name that two functions log has theirs before."""
        extra: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        for name in self.values:
            logged = self.logged.get((name, index), Logged())
            for key, value in logged.extra.items():
                extra[key if key not in extra else f"{name}/{key}"] = value
            for key, number in logged.metrics.items():
                metrics[key if key not in metrics else f"{name}/{key}"] = number
        return extra, metrics


@dataclass(slots=True)
class Trial:
    """The completions of a task that failed, each tried alone."""

    kind: RewardFailure
    report: str
    """Of the failure of all together."""
    num_open: int
    num_failed: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """A function on some completions of a group, waiting or running."""

    group: Group
    name: str
    indexes: tuple[int, ...]
    timeout_s: float
    trial: Trial | None = None
    """What this is one completion of, tried alone."""
    exclusive: bool = False
    """Whether it must run with no other, because one of several ended their process."""


@dataclass(slots=True)
class Process:
    """A reward process and what it is doing."""

    handle: Any
    starting: Any
    """Reference of its start; None when it is ready."""
    lane: Lane
    start_deadline: float
    """Until when it must be ready, on the clock of time.monotonic()."""
    parts: dict[Any, tuple[Part, float]] = field(default_factory=dict)
    """Reference -> what runs, and until when on the clock of time.monotonic()."""
    warm: set[str] = field(default_factory=set)
    """Functions that returned values here: what they load at their first call is loaded."""


def task_of(part: Part) -> Task:
    """What a process needs of it, and no more."""
    group = part.group.group
    completions = [replace(group.completions[index], rollout_logprobs=[]) for index in part.indexes]
    prompt = replace(group.prompt, token_ids=[])
    sent = replace(group, prompt=prompt, completions=completions, rewards=[])
    return Task(part.name, sent, part.group.state, part.timeout_s)
