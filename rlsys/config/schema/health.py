"""Thresholds of the warnings of a run: the section `tracking.health`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from rlsys.config.schema.section import Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Factor = Annotated[float, Field(gt=1.0)]


class RunHealthConfig(Section):
    """When a run warns: a field has the name of its warning, and null never gives it."""

    gradient_spike: Factor | None = 10.0
    """grad_norm over its median of the 50 steps before."""
    slow_step: Factor | None = 2.0
    """time/step, the median of the last 5 steps (of short ones, those in 30 seconds, 50 at most)
    over the median of the 50 before these."""


class SftHealthConfig(RunHealthConfig):
    """When a run warns: a field has the name of its warning, and null never gives it."""

    overfitting: PositiveFloat | None = 0.02
    """Rise of a held-out loss above its lowest value, as a share of that, in two evaluations in a
    row while the training loss fell."""


class HealthConfig(RunHealthConfig):
    """When a run warns: a field has the name of its warning, and null never gives it."""

    mismatch: PositiveFloat | Literal["auto"] | None = "auto"
    """sampling/logp_difference/mean in nats, in steps without stale completions. auto: what
    rounding explains, 1e-4 in float32, 0.1 in bfloat16, 0.5 with engines in FP8, divided by a
    temperature below 1. grpo.max_logp_difference ends the run."""
    reference_differs: bool = True
    """Whether to warn of a kl in the first step that rounding does not explain."""
    empty_step: bool = True
    """Whether to warn of a step that trains nothing; the third in a row ends the run either way."""
    entropy_collapse: Share | None = 0.1
    """entropy, the median of 5 steps, as a share of its median in the first 5 steps of the run."""
    kl_runaway: PositiveFloat | None = 1.0
    """kl in nats per token, the median of 5 steps."""
    clipped_ratios: Share | None = 0.3
    """clip_ratio/region_mean or cispo_clip_ratio, the median of 5 steps."""
    no_reward: bool = True
    """Whether to warn of a step in which no completion has a reward."""
    dead_reward: Annotated[int, Field(ge=2, le=200)] | None = 20
    """Steps in a row in which a reward function gives one value to all completions."""
    perfect_reward: Share | None = 0.99
    """Mean of the function that eval.correct names, over 5 steps, if its values are 0 to 1."""
    all_alike_groups: Share | None = 0.9
    """frac_reward_zero_std, the median of 5 steps."""
    reward_hacking: PositiveFloat | None = 3.0
    """Standard errors by which held-out accuracy is below its best value in two evaluations in a
    row, and by which the reward has risen since then."""
    held_out_stalls: Share | None = 0.25
    """Share of the rise of training accuracy that held-out accuracy stays below, for certain (2
    standard errors), between the evaluations in which both were measured."""
    length_explosion: Factor | None = 2.0
    """completions/mean_length, the median of 5 steps, over that of up to 50 steps before, if the
    reward has not risen meanwhile."""
    clipped_completions: Share | None = 0.3
    """completions/clipped_ratio, the median of 5 steps."""
    stale_completions: Share | None = 0.95
    """staleness/mean as a share of rollout.max_staleness, the median of 10 steps, while engines
    wait for more than a tenth of the time."""
    idle_engines: Share | None = 0.5
    """idle/rollout_frac, the median of 10 steps, if rollout.max_staleness is above 0."""
