"""A job: one reward function on some completions of one group, waiting or running."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rlsys.rewards.base import TrainerState
from rlsys.rewards.logged import Logged
from rlsys.rewards.pool.serve import ScoreRequest
from rlsys.types import RewardFailure, RolloutGroup


@dataclass(slots=True)
class PendingGroup:
    """A group on its way through the reward functions."""

    rollout_group: RolloutGroup
    state: TrainerState
    values: dict[str, list[float]]
    """[G] by function, NaN until known."""
    failures: list[dict[str, RewardFailure]]
    """[G] by function."""
    open_jobs: int = 0
    logged: dict[tuple[str, int], Logged] = field(default_factory=dict)
    """By function and completion, where a function logged something."""
    gates_passed: bool = False
    """Whether the functions behind gates were called."""
    is_forgotten: bool = False
    """Whether nobody wants its rewards any more."""

    def logged_about(self, index: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Columns and metrics of a completion. A key that two functions log keeps its name for the
        first; the second one's is prefixed with the function's name."""
        extra: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        for function in self.values:
            logged = self.logged.get((function, index), Logged())
            for key, value in logged.extra.items():
                extra[key if key not in extra else f"{function}/{key}"] = value
            for key, number in logged.metrics.items():
                metrics[key if key not in metrics else f"{function}/{key}"] = number
        return extra, metrics


@dataclass(slots=True)
class Retry:
    """A failed job whose completions are tried again, each alone."""

    kind: RewardFailure
    """How the job failed with all completions together."""
    report: str
    num_open: int
    num_failed: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One reward function on some completions of one group."""

    pending: PendingGroup
    function: str
    indexes: tuple[int, ...]
    """The completions, by their places in the group."""
    timeout_s: float
    retry: Retry | None = None
    """The failed job, if this one tries one of its completions alone."""
    exclusive: bool = False
    """True if its process ended while it ran several jobs: this one then runs alone."""

    def request(self) -> ScoreRequest:
        """What a process needs to know, and no more."""
        group = self.pending.rollout_group
        completions = [
            replace(group.completions[index], rollout_logprobs=[], routed_experts=None)
            for index in self.indexes
        ]
        prompt = replace(group.prompt, token_ids=[])
        group = replace(group, prompt=prompt, completions=completions, rewards=[])
        return ScoreRequest(self.function, group, self.pending.state, self.timeout_s)
