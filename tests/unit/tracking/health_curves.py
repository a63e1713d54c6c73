"""Curves of runs as they are recorded: a healthy one with noise, and what can go wrong with it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from config_cases import values

from rlsys.config import Config
from rlsys.tracking.health import Health, rules_of

Metrics = dict[str, float]
EVERY = 20
"""Steps between two evaluations."""
HELD_OUT = 400
"""Prompts of an evaluation."""


def health_of(stop_on: list[str] | None = None, **sections: Any) -> Health:
    """The health of a run with the defaults, and 400 prompts ahead of it."""
    sections.setdefault("grpo", {"beta": 0.04})
    sections.setdefault("rollout", {"max_staleness": 4, "oversample_prompts": 16})
    sections.setdefault("reward", {"reward_funcs": ["accuracy", "format"]})
    config = Config.model_validate(values(**sections))
    return Health(rules_of(config, dtype="bfloat16"), stop_on or [])


def healthy(step: int, noise: Callable[[float], float]) -> Metrics:
    """A step of a run that learns: entropy falls slowly, accuracy and kl rise.

    `noise(size)` is a factor around 1, as large as such curves have it.
    """
    progress = min(step / 200, 1.0)
    accuracy = min(1.0, (0.2 + 0.5 * progress) * noise(0.1))
    return {
        "reward": accuracy + 0.9,
        "reward_std": 0.4 * noise(0.1),
        "rewards/accuracy/mean": accuracy,
        "rewards/accuracy/std": math.sqrt(accuracy * (1 - accuracy)),
        "rewards/format/mean": 0.9,
        "rewards/format/std": 0.3,
        "frac_reward_zero_std": min(1.0, (0.2 + 0.4 * progress) * noise(0.2)),
        "advantages/abs_max": 2.0,
        "completions/mean_length": (400 + 200 * progress) * noise(0.05),
        "completions/clipped_ratio": min(1.0, 0.08 * noise(0.4)),
        "num_loss_tokens": 9000.0,
        "entropy": (1.0 - 0.6 * progress) * noise(0.1),
        "kl": (1e-3 if step == 1 else 0.1 * progress) * noise(0.2),
        "clip_ratio/region_mean": 0.02 * noise(0.5),
        "grad_norm": 0.5 * noise(0.5),
        "sampling/logp_difference/mean": 0.02 * noise(0.2),
        "sampling/masked_fraction": 0.01,
        "staleness/mean": 2.0 * noise(0.1),
        "staleness/max": 3.0,
        "idle/rollout_frac": min(1.0, 0.2 * noise(0.3)),
        "time/rollout": 30.0 * noise(0.15),
        "time/policy_update": 20.0 * noise(0.05),
        "time/step": 52.0 * noise(0.12),
    }


def evaluation(accuracy: float) -> Metrics:
    """An evaluation of `HELD_OUT` prompts."""
    return {
        "eval/rewards/accuracy/mean": accuracy,
        "eval/rewards/accuracy/std": math.sqrt(accuracy * (1 - accuracy)),
        "eval/num_completion_tokens": 50.0 * HELD_OUT,
        "eval/completions/mean_length": 50.0,
    }


def run(
    seed: int = 0, steps: int = 200, scale: float = 1.0, *, learns: bool = True
) -> Iterator[tuple[int, Metrics]]:
    """The rows of a healthy run; held-out accuracy follows that of training."""
    source = random.Random(seed)

    def noise(size: float) -> float:
        return math.exp(source.gauss(0, scale * size / 2))

    def held_out(step: int) -> Metrics:
        expected = 0.2 + 0.4 * min(step / 200, 1.0) * learns
        hits = sum(source.random() < expected for _ in range(HELD_OUT))
        return evaluation(hits / HELD_OUT)

    yield 0, held_out(0)
    for step in range(1, steps + 1):
        yield step, healthy(step if learns else 1, noise)
        if step % EVERY == 0:
            yield step, held_out(step)


ONSET = 100
"""Step at which the curves below go wrong."""


def from_onset(**curves: Callable[[int, float], float]) -> Callable[[int, Metrics], None]:
    """Changes metrics from `ONSET` on: name -> (steps since then, healthy value) -> value. In
    names, __ is a slash."""

    def change(step: int, row: Metrics) -> None:
        for name, curve in curves.items():
            metric = name.replace("__", "/")
            if step >= ONSET and metric in row:
                row[metric] = curve(step - ONSET, row[metric])

    return change


def flat_held_out(step: int, row: Metrics) -> None:
    """Held-out accuracy that stays where it was."""
    if "eval/rewards/accuracy/mean" in row:
        row |= evaluation(0.2)


def falling_held_out(step: int, row: Metrics) -> None:
    """Held-out accuracy that falls after `ONSET`."""
    if "eval/rewards/accuracy/mean" in row and step > ONSET:
        row |= evaluation(0.4 - 0.003 * (step - ONSET))


BAD: dict[str, Callable[[int, Metrics], None]] = {
    "entropy_collapse": from_onset(entropy=lambda n, v: v * 0.9**n),
    "kl_runaway": from_onset(kl=lambda n, v: v + 0.1 * 1.1**n),
    "clipped_ratios": from_onset(clip_ratio__region_mean=lambda n, v: min(1.0, v + 0.02 * n)),
    "gradient_spike": from_onset(grad_norm=lambda n, v: 30.0 if n == 7 else v),
    "slow_step": from_onset(time__step=lambda n, v: v + 100, time__rollout=lambda n, v: v + 100),
    "mismatch": from_onset(
        sampling__logp_difference__mean=lambda n, v: v + 0.3, staleness__max=lambda n, v: 0.0
    ),
    "empty_step": from_onset(num_loss_tokens=lambda n, v: 0.0 if n == 3 else v),
    "no_reward": from_onset(reward=lambda n, v: math.nan if n == 3 else v),
    "dead_reward": from_onset(
        rewards__format__mean=lambda n, v: 0.0, rewards__format__std=lambda n, v: 0.0
    ),
    "perfect_reward": from_onset(
        rewards__accuracy__mean=lambda n, v: 0.995, rewards__accuracy__std=lambda n, v: 0.07
    ),
    "all_alike_groups": from_onset(frac_reward_zero_std=lambda n, v: 0.97),
    "length_explosion": from_onset(
        completions__mean_length=lambda n, v: v * 1.05 ** min(n, 40), reward=lambda n, v: 1.2
    ),
    "clipped_completions": from_onset(
        completions__clipped_ratio=lambda n, v: min(1.0, v + 0.01 * n)
    ),
    "stale_completions": from_onset(
        staleness__mean=lambda n, v: 4.0, idle__rollout_frac=lambda n, v: 0.3
    ),
    "idle_engines": from_onset(idle__rollout_frac=lambda n, v: 0.7),
    "reward_hacking": falling_held_out,
    "held_out_stalls": flat_held_out,
}
"""Warning -> what makes a healthy run deserve it."""
