"""Rules within the section `reward`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.gates import parse_gate
from rlsys.problems import Problem
from rlsys.text import counted

if TYPE_CHECKING:
    from rlsys.config.schema import RewardConfig


def learning_problems(reward: RewardConfig, *, has_teacher: bool) -> Iterator[Problem]:
    """Rules about what a policy learns from: rewards, or a teacher."""
    if not reward.names:
        alone = ""
        if has_teacher:
            alone = ". With weight 0 in reward.reward_weights the teacher alone is learned from"
        yield Problem(
            "reward.reward_funcs: nothing scores the completions: name a function (`rlsys rewards "
            f"list` shows them), or a model in reward.reward_model{alone}"
        )
    weights = reward.reward_weights
    if weights and not any(weights) and not has_teacher:
        yield Problem(
            "reward.reward_weights are all 0, so there is nothing to learn from: give at least one "
            "reward function another weight"
        )


def reward_problems(reward: RewardConfig) -> Iterator[Problem]:
    """Every rule within the reward section that `reward` breaks, whatever is learned from it."""
    names, weights = reward.names, reward.reward_weights
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        yield Problem(
            f"reward.reward_funcs names {', '.join(repeated)} more than once: name each once, and "
            "give it a larger weight in reward.reward_weights if it should count more"
        )
    if weights is not None and len(weights) != len(names):
        yield Problem(
            f"reward.reward_weights has {counted(len(weights), 'value')} for "
            f"{counted(len(names), 'reward function')} in reward.reward_funcs and "
            f"reward.reward_model ({', '.join(names)}): give one weight for each, or leave it out "
            "for 1 each"
        )
    # Settings under reward_model are for all models.
    known = {*names, *(["reward_model"] if reward.models else [])}
    stray = sorted(set(reward.reward_params) - known)
    if stray:
        yield Problem(
            f"reward.reward_params has settings for {', '.join(stray)}, which reward.reward_funcs "
            f"does not name ({', '.join(names)}): add it there, or take its settings out"
        )
    yield from _gate_problems(reward)


def _gate_problems(reward: RewardConfig) -> Iterator[Problem]:
    names, gates = reward.names, reward.gate
    for gated, text in gates.items():
        try:
            by = parse_gate(text).by
        except ValueError as error:
            yield Problem(f"reward.gate of {gated}: {error}")
            continue
        stray = [name for name in (gated, by) if name not in names]
        if stray:
            yield Problem(
                f"reward.gate lets {gated} count where {text}, but reward.reward_funcs does not "
                f"name {' and '.join(stray)}: add it there, with weight 0 in "
                "reward.reward_weights if it should only be the gate"
            )
        elif by in gates:
            yield Problem(
                f"reward.gate lets {gated} count where {text}, but {by} has a gate itself: gate "
                f"{gated} by what gates {by} ({gates[by]}), or take one of the two gates out"
            )
