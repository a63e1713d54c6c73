"""The one thing to change first, from where the time of a run went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlsys.timeline.shares import OTHER, REWARD, SAMPLING, TimeShares

WORTH_IT = 0.15
"""Share of the time below which nothing is worth a change."""
EVALUATIONS = 0.3
"""The same for evaluations, which are wanted."""
LONG_TAIL = 4.0
"""Longest completion, in means, from which a batch waits for the tail."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What advice needs to know of a run besides its time."""

    method: str = "grpo"
    """grpo or sft."""
    device: str = "cuda"
    """cpu or cuda."""
    is_colocated: bool = False
    """Whether engines and policy take turns on the same GPUs."""
    max_staleness: int = 0
    longest_over_mean: float = 1.0
    """Longest completion over the mean length of its step, mean over the steps."""


@dataclass(frozen=True, slots=True)
class _Case:
    shares: TimeShares
    run: RunFacts

    def of(self, limit: str) -> float:
        """Share of the time that the run waited for something."""
        return self.shares.share(self.shares.limits.get(limit, 0.0))

    def idle(self, role: str) -> float:
        return self.shares.idle_shares().get(role, 0.0)

    @property
    def on_cpu(self) -> bool:
        return self.run.device == "cpu"


def advise(shares: TimeShares, run: RunFacts) -> str:
    """What to change first, with the numbers that say so; docs/performance.md has the rules."""
    case = _Case(shares, run)
    return next(text for rule in _RULES if (text := rule(case)) is not None)


def _evaluations(case: _Case) -> str | None:
    if (share := case.of("evaluation")) < EVALUATIONS:
        return None
    return f"evaluations take {share:.0%} of the time: raise eval_steps"


def _checkpoints(case: _Case) -> str | None:
    if (share := case.of("checkpoint")) < WORTH_IT:
        return None
    return f"the run waits {share:.0%} of the time for checkpoints: raise checkpoint.save_steps"


def _rewards(case: _Case) -> str | None:
    if (share := case.of(REWARD)) < WORTH_IT:
        return None
    seconds: dict[str, float] = {}
    for actor in case.shares.actors.values():
        if actor.role == "reward":
            for name, value in actor.phases.items():
                seconds[name] = seconds.get(name, 0.0) + value
    slowest = max(seconds, key=lambda name: seconds[name])
    return (
        f"rewards alone take {share:.0%} of the time, most of it {slowest}: raise "
        f"reward.num_workers, or make {slowest} faster"
    )


def _weight_syncs(case: _Case) -> str | None:
    if (share := case.of("weight_sync")) < WORTH_IT:
        return None
    if case.on_cpu:
        what = "more completions a step (generation_batch_size) make them rarer"
    elif case.run.is_colocated:
        what = (
            "they include the switching of turns: more completions a step make them rarer, and "
            "placement: dedicated needs none"
        )
    else:
        what = (
            "see weight_sync/transport_seconds: if it is short, look for a warning that weights "
            "go through vLLM's loader; else compare weight_sync/transport_gb_per_s with the network"
        )
    return f"weight syncs take {share:.0%} of the time: {what}"


def _data(case: _Case) -> str | None:
    if (share := case.of("data")) < WORTH_IT:
        return None
    return (
        f"the policy waits {share:.0%} of the time for data: make the preprocessor faster, or do "
        "without data.streaming"
    )


def _no_phase(case: _Case) -> str | None:
    if (share := case.of(OTHER)) < WORTH_IT:
        return None
    return (
        f"{share:.0%} of the time is in no phase, so the driver itself is slow: look at trackers "
        "(tracking.report_to) and at the disk of output_dir"
    )


def _turns(case: _Case) -> str | None:
    policy, engines = case.idle("policy"), case.idle("rollout")
    take_turns = case.run.max_staleness == 0 and not case.run.is_colocated and not case.on_cpu
    if not take_turns or case.of(SAMPLING) < WORTH_IT or min(policy, engines) < WORTH_IT:
        return None
    return (
        f"the policy idles {policy:.0%} of the time and the engines {engines:.0%}, in turns: set "
        "rollout.max_staleness: 1"
    )


def _tail(case: _Case) -> str | None:
    share, tail = case.of(SAMPLING), case.run.longest_over_mean
    if share < WORTH_IT or tail < LONG_TAIL or case.on_cpu:
        return None
    staleness = case.run.max_staleness
    change = "lower rollout.max_completion_length, which ends the tail"
    if 0 < staleness < LONG_TAIL and not case.run.is_colocated:
        change = f"set rollout.max_staleness: {2 * staleness}, so that more prompts hide the tail"
    return (
        f"the run waits {share:.0%} of the time for samples, and the longest completion of a step "
        f"has {tail:.1f} x the mean length: {change}"
    )


def _sampling(case: _Case) -> str | None:
    if case.shares.limited_by != SAMPLING:
        return None
    if case.on_cpu:
        change = "more cores, or a smaller rollout.max_completion_length"
    elif case.run.is_colocated:
        change = "more GPUs, each with an engine, or a smaller rollout.max_completion_length"
    else:
        change = "raise rollout.num_engines"
    return f"the run waits {case.of(SAMPLING):.0%} of the time for samples: {change}"


def _update(case: _Case) -> str:
    longest = case.shares.limited_by or "policy_update"
    text = f"{longest} takes {case.of(longest):.0%} of the time"
    if case.on_cpu:
        return f"{text}: more cores, or fewer tokens a step"
    idle = case.idle("rollout")
    if case.run.max_staleness and idle >= WORTH_IT:
        text += f", and the engines idle {idle:.0%}"
    return f"{text}: raise policy.world_size"


_RULES: tuple[Callable[[_Case], str | None], ...] = (
    # What takes time without training or sampling comes first, then what can be hidden behind
    # something else, and last what takes more devices.
    *(_evaluations, _checkpoints, _rewards, _weight_syncs, _data, _no_phase),
    *(_turns, _tail, _sampling, _update),
)
