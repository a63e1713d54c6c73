"""Rules about sampling that runs ahead: what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlsys.tracking.health.base import WINDOW, History, Reading, Rule

MOST_WAITING = 0.1
"""Share of the time in which engines may wait although completions are as stale as is allowed."""


@dataclass(frozen=True, slots=True)
class StaleCompletions(Rule):
    """Completions are as stale as is allowed, and engines wait for that reason."""

    share: float
    max_staleness: int
    name = "stale_completions"
    look_at = (
        "Engines may not sample further ahead: the update is the bottleneck. Make it faster "
        "(policy.world_size, larger micro-batches), give engines fewer GPUs, or raise "
        "rollout.max_staleness if sampling/logp_difference/mean stays small."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One."""
        value = history.median("staleness/mean", WINDOW)
        waiting = history.median("idle/rollout_frac", WINDOW)
        if value is None or waiting is None:
            return
        says = (
            f"completions are {value:.2g} weight versions old, rollout.max_staleness is "
            f"{self.max_staleness}, and engines wait for {waiting:.0%} of the time."
        )
        threshold = self.share * self.max_staleness
        yield Reading("staleness/mean", value, threshold, says, holds=waiting > MOST_WAITING)


@dataclass(frozen=True, slots=True)
class IdleEngines(Rule):
    """No engine has anything to sample for much of the time."""

    threshold: float
    name = "idle_engines"
    look_at = (
        "The update is the bottleneck, or too few prompts are in flight: raise "
        "rollout.max_staleness or rollout.oversample_prompts, or move GPUs from engines to the "
        "policy. See idle/policy_frac and time/policy_update."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One."""
        value = history.median("idle/rollout_frac", WINDOW)
        if value is not None:
            says = (
                f"the rollout engines had nothing to do for {value:.0%} of the time "
                f"(idle/rollout_frac, the median of the last {WINDOW} steps)."
            )
            yield Reading("idle/rollout_frac", value, self.threshold, says)
