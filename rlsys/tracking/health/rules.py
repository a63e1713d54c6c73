"""The rules of a run, from its config."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rlsys.config import Config, PreferenceConfig, RewardModelConfig, RunConfig, SftConfig
from rlsys.config.schema.health import HealthConfig
from rlsys.tracking.health.base import Rule
from rlsys.tracking.health.reward_rules import (
    AllAlikeGroups,
    ClippedCompletions,
    DeadReward,
    HeldOutStalls,
    LengthExplosion,
    NoReward,
    Overfitting,
    PerfectReward,
    RewardHacking,
    completions_option,
)
from rlsys.tracking.health.rollout_rules import IdleEngines, StaleCompletions
from rlsys.tracking.health.update_rules import (
    ClippedRatios,
    EmptyStep,
    EntropyCollapse,
    GradientSpike,
    KlRunaway,
    Mismatch,
    ReferenceDiffers,
    SlowStep,
)

MAX_DIFFERENCE_OF_DTYPE = {"float32": 1e-4, "bfloat16": 0.1, "FP8": 0.5}
"""Mean of |log-prob of policy - log-prob of engine|, in nats, that rounding explains. FP8: a random
model of 4 layers had 9 times the difference of bfloat16, with rounding as the engine's, on CPU."""
MAX_KL_OF_DTYPE = {"float32": 1e-6, "bfloat16": 1e-2}
"""KL (k3) between two models of the same weights; 2e-3 was measured in bfloat16."""


def rules_of(config: RunConfig, *, dtype: str, completions: Path | None = None) -> list[Rule]:
    """What to look for in a run.

    Args:
        config: of the run.
        dtype: type of the weights.
        completions: the run's completions.jsonl or None, for commands in warnings.
    """
    rules = list(_of_every_run(config))
    if isinstance(config, SftConfig | PreferenceConfig | RewardModelConfig):
        if config.tracking.health is not None:
            rules += _of_supervised(config)
    elif isinstance(config, Config):
        rules += _that_end_runs(config, dtype)
        if (health := config.tracking.health) is not None:
            rules += _of_updates(config, health, dtype)
            rules += _of_rewards(config, health, completions_option(completions))
            rules += _of_rollouts(config, health)
    return rules


def _of_every_run(config: RunConfig) -> Iterator[Rule]:
    health = config.tracking.health
    if health is None:
        return
    if health.gradient_spike is not None:
        yield GradientSpike(health.gradient_spike)
    if health.slow_step is not None:
        yield SlowStep(health.slow_step)


def _of_supervised(
    config: SftConfig | PreferenceConfig | RewardModelConfig,
) -> Iterator[Rule]:
    health = config.tracking.health
    if health is not None and health.overfitting is not None:
        yield Overfitting(health.overfitting)


def _that_end_runs(config: Config, dtype: str) -> Iterator[Rule]:
    """Rules that may end a run, so they look also where nothing is to be warned of."""
    health = config.tracking.health or HealthConfig(mismatch=None, empty_step=False)
    kind = "FP8" if config.rollout.quantization else dtype
    threshold = math.inf if health.mismatch is None else health.mismatch
    if threshold == "auto":
        # A temperature below 1 stretches logits, and with them their differences.
        threshold = MAX_DIFFERENCE_OF_DTYPE[kind] * max(1.0, 1 / config.rollout.temperature)
    assert not isinstance(threshold, str)
    yield Mismatch(threshold, kind, config.grpo.max_logp_difference)
    yield EmptyStep(health.empty_step, config.grpo, config.rollout.max_completion_length)


def _of_updates(config: Config, health: HealthConfig, dtype: str) -> Iterator[Rule]:
    is_twin = config.reference_path == config.model.path and config.optimizer_steps_per_update == 1
    if health.reference_differs and is_twin:
        yield ReferenceDiffers(MAX_KL_OF_DTYPE[dtype], dtype)
    if health.entropy_collapse is not None:
        yield EntropyCollapse(health.entropy_collapse)
    if health.kl_runaway is not None:
        yield KlRunaway(health.kl_runaway)
    if health.clipped_ratios is not None:
        yield ClippedRatios(health.clipped_ratios)


def _of_rewards(config: Config, health: HealthConfig, completions: str) -> Iterator[Rule]:
    accuracy = config.eval_correct.by
    if health.no_reward:
        yield NoReward(completions)
    if health.dead_reward is not None:
        yield DeadReward(health.dead_reward, completions)
    if health.perfect_reward is not None:
        yield PerfectReward(accuracy, health.perfect_reward)
    # A teacher tells the tokens of completions with equal rewards apart.
    if health.all_alike_groups is not None and config.used_teacher is None:
        yield AllAlikeGroups(health.all_alike_groups)
    if health.reward_hacking is not None:
        yield RewardHacking(accuracy, health.reward_hacking)
    if health.held_out_stalls is not None:
        yield HeldOutStalls(accuracy, health.held_out_stalls)
    if health.length_explosion is not None:
        yield LengthExplosion(health.length_explosion)
    if health.clipped_completions is not None:
        yield ClippedCompletions(health.clipped_completions, config.rollout.max_completion_length)


def _of_rollouts(config: Config, health: HealthConfig) -> Iterator[Rule]:
    """Where sampling runs ahead: else the two sides take turns, and each waits for the other."""
    max_staleness = config.rollout.max_staleness
    if max_staleness == 0:
        return
    if health.stale_completions is not None:
        yield StaleCompletions(health.stale_completions, max_staleness)
    if health.idle_engines is not None:
        yield IdleEngines(health.idle_engines)
