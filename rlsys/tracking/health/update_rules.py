"""Rules about the update: policy and engine, entropy, KL, clipping and gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlsys.config import GrpoConfig
from rlsys.tracking.health.base import KEPT, SMOOTHED, History, Reading, Row, Rule

NEARLY_ALL = 0.95
"""A step trains nothing if this share of its tokens has no policy gradient."""
MAX_EMPTY_STEPS = 3
"""The run ends after this many steps in a row that train nothing."""
BASE_STEPS = 50
"""Steps with which the newest are compared, and the fewest of these."""
LEAST_BASE_STEPS = 10
SLOW_FOR_S = 30.0
"""Seconds that steps of less than 6 seconds have to be slow for: machines do other things too."""
DIFFERENCE = "sampling/logp_difference/mean"
MASKED = "sampling/masked_fraction"


@dataclass(frozen=True, slots=True)
class Mismatch(Rule):
    """Policy and rollout engine compute other log-probs for the same tokens."""

    threshold: float
    """Nats per token; infinite: only `ends_above` counts."""
    dtype: str
    """What rounds, for the message."""
    ends_above: float | None
    """grpo.max_logp_difference."""
    name = "mismatch"
    look_at = (
        "Likely causes: both read the model's config.json differently, weights did not arrive, or "
        "kernels are quantized or of low precision. `rlsys doctor --canary CONFIG` and "
        "docs/debugging.md help to find the cause."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One, where all completions are from the weights that are trained."""
        row = history.newest
        value = row.number(DIFFERENCE)
        if value is None or row.number("staleness/max"):
            return  # stale ones also differ by what was learned since
        says = (
            f"log-probs of policy and rollout engine differ by {value:.3g} nats per token at step "
            f"{row.step} ({DIFFERENCE}), and rounding in {self.dtype} explains "
            f"{self.threshold:g}: completions are not sampled from the policy that is trained."
        )
        ends = None
        if self.ends_above is not None and not value <= self.ends_above:
            ends = (
                f"{says} {self.look_at} This is above grpo.max_logp_difference = "
                f"{self.ends_above:g}, so the run ends; with null it would continue."
            )
        warns = math.isfinite(self.threshold)
        yield Reading(DIFFERENCE, value, self.threshold, says, holds=warns, ends=ends)


@dataclass(frozen=True, slots=True)
class ReferenceDiffers(Rule):
    """The reference is not the policy's twin in the first step."""

    threshold: float
    dtype: str
    name = "reference_differs"
    look_at = "Run `rlsys doctor --canary CONFIG` to find out which."

    def readings(self, history: History) -> Iterator[Reading]:
        """One, at step 1."""
        kl = history.newest.number("kl")
        if history.newest.step == 1 and kl is not None:
            says = (
                f"kl is {kl:.3g} at step 1, where policy and reference have the same weights and "
                f"rounding in {self.dtype} explains {self.threshold:g}: one of them does not "
                "compute what its files say."
            )
            yield Reading("kl", abs(kl), self.threshold, says)


@dataclass(frozen=True, slots=True)
class EmptyStep(Rule):
    """A step trains nothing; several in a row end the run."""

    warns: bool
    grpo: GrpoConfig
    max_completion_length: int
    name = "empty_step"
    look_at = f"{MAX_EMPTY_STEPS} such steps in a row end the run."

    def readings(self, history: History) -> Iterator[Reading]:
        """One, unless the step has no reward: `NoReward` warns of that."""
        row = history.newest
        empty = self._is_empty(row)
        if empty is None:
            return
        metric, value, threshold, says = self._found(row)
        run = list(history.steps)[-MAX_EMPTY_STEPS:]
        in_a_row = len(run) == MAX_EMPTY_STEPS and all(map(self._is_empty, run))
        ends = f"{MAX_EMPTY_STEPS} steps in a row trained nothing: {says}" if in_a_row else None
        yield Reading(
            *(metric, value, threshold, says),
            below=metric == "num_loss_tokens",
            holds=self.warns and empty,
            ends=ends,
        )

    def _is_empty(self, row: Row) -> bool | None:
        """Whether the step trained nothing; None if rewards are missing."""
        reward = row.number("reward")
        if reward is not None and math.isnan(reward):
            return None
        masked = row.number(MASKED)
        return row.number("num_loss_tokens") == 0 or (masked is not None and masked >= NEARLY_ALL)

    def _found(self, row: Row) -> tuple[str, float, float, str]:
        """Metric, value, threshold, and what it means."""
        masked = row.number(MASKED)
        if masked is None or row.number("num_loss_tokens") == 0:
            reason = (
                f"all completions were cut at rollout.max_completion_length = "
                f"{self.max_completion_length} and grpo.mask_truncated_completions leaves those "
                "out: raise the length."
                if self.grpo.mask_truncated_completions
                else "no completion has a token to train on: read them with `rlsys completions`."
            )
            says = f"step {row.step} trained nothing, {reason}"
            return "num_loss_tokens", row.number("num_loss_tokens") or 0.0, 1.0, says
        difference = row.number(DIFFERENCE)
        says = (
            f"step {row.step} trained next to nothing, {masks(self.grpo)} left out {masked:.1%} of "
            f"its tokens; policy and rollout engine differ by {difference or math.nan:.3g} nats "
            "per token. If that is large, see docs/debugging.md. If it is small, widen the "
            "threshold, or use token or geometric weights: the ratio of a completion is the "
            "product of its tokens' ratios."
        )
        return MASKED, masked, math.nextafter(NEARLY_ALL, 0), says


@dataclass(frozen=True, slots=True)
class EntropyCollapse(Rule):
    """The policy has become almost certain of every token."""

    share: float
    name = "entropy_collapse"
    look_at = (
        "All completions of a prompt become alike, and groups teach nothing: see "
        "frac_reward_zero_std, and read the latest completions with `rlsys completions`. If the "
        "reward is not at its best, start from an earlier checkpoint with a lower policy.lr, a "
        "larger grpo.epsilon_high (clip-higher) or a KL (grpo.beta)."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One, from the tenth step on."""
        first = [value for row in history.first[:SMOOTHED] if (value := row.number("entropy"))]
        value = history.median("entropy")
        if len(history.steps) < 2 * SMOOTHED or len(first) < SMOOTHED or value is None:
            return
        start = statistics.median(first)
        says = (
            f"entropy is {value:.3g} nats, {value / start:.1%} of the {start:.3g} in the first "
            "steps: exploration is nearly over."
        )
        yield Reading("entropy", value, self.share * start, says, below=True)


@dataclass(frozen=True, slots=True)
class KlRunaway(Rule):
    """The policy is far from the reference."""

    threshold: float
    name = "kl_runaway"
    look_at = (
        "The policy has left what the reference knows: read completions for broken language, "
        "and see whether held-out rewards fall. A larger grpo.beta or a lower policy.lr holds it "
        "back; reference.sync_steps lets the reference follow."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One."""
        value = history.median("kl")
        if value is not None:
            says = (
                f"kl to the reference is {value:.3g} nats per token, the median of the last "
                f"{SMOOTHED} steps."
            )
            yield Reading("kl", value, self.threshold, says)


@dataclass(frozen=True, slots=True)
class ClippedRatios(Rule):
    """Many tokens have no gradient, because their ratio is beyond epsilon."""

    threshold: float
    name = "clipped_ratios"
    look_at = (
        "One rollout moves the policy further than epsilon allows: a lower policy.lr, fewer "
        "grpo.num_iterations or optimizer steps a rollout, or a wider epsilon. See ratio/max and "
        "sampling/logp_difference/mean too."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One for each kind of clipping."""
        for metric in ("clip_ratio/region_mean", "cispo_clip_ratio"):
            value = history.median(metric)
            if value is not None:
                says = (
                    f"{value:.0%} of the tokens were clipped ({metric}, the median of the last "
                    f"{SMOOTHED} steps)."
                )
                yield Reading(metric, value, self.threshold, says)


@dataclass(frozen=True, slots=True)
class GradientSpike(Rule):
    """One gradient is far larger than those before."""

    factor: float
    name = "gradient_spike"
    look_at = (
        "policy.max_grad_norm bounds what it does to the weights. See what the step trained on "
        "with `rlsys completions --step`, and whether loss and entropy jump after it; if spikes "
        "repeat, lower policy.lr."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One, once enough steps have a gradient to compare with."""
        value = history.newest.number("grad_norm")
        base = _base([v for v in history.latest("grad_norm", BASE_STEPS, skip=1) if v > 0])
        if value is not None and base is not None:
            says = (
                f"grad_norm is {value:.3g} at step {history.newest.step}, and its median of the "
                f"steps before is {base:.3g}."
            )
            yield Reading("grad_norm", value, self.factor * base, says)


@dataclass(frozen=True, slots=True)
class SlowStep(Rule):
    """Steps take much longer than they did."""

    factor: float
    name = "slow_step"
    look_at = (
        "If completions have become longer it has to be so (completions/mean_length). If not: "
        "another process on the machine (`nvidia-smi`, `top`), a slow disk, throttled GPUs, or an "
        "engine that was lost (fault/rollout_restarts)."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One."""
        known = history.latest("time/step", KEPT)
        if not known:
            return
        typical = max(statistics.median(known), 1e-3)
        count = min(max(SMOOTHED, math.ceil(SLOW_FOR_S / typical)), BASE_STEPS)
        base = _base(history.latest("time/step", BASE_STEPS, skip=count))
        if base is None:
            return
        value = statistics.median(known[-count:])
        says = (
            f"steps take {value:.3g} s, and {base:.3g} s before (medians of time/step)"
            f"{_grown_phase(history, count)}."
        )
        yield Reading("time/step", value, self.factor * base, says)


def _base(values: Sequence[float]) -> float | None:
    """The median of the steps with which others are compared; None if they are too few."""
    return statistics.median(values) if len(values) >= LEAST_BASE_STEPS else None


def _grown_phase(history: History, count: int) -> str:
    """Which phase has grown most, in words; empty if none has."""
    grown: dict[str, float] = {}
    for name in history.newest.metrics:
        if name.startswith("time/") and name != "time/step":
            now = history.latest(name, count)
            before = history.latest(name, BASE_STEPS, skip=count)
            if now and before:
                grown[name] = statistics.median(now) - statistics.median(before)
    most = max(grown, key=lambda name: grown[name], default=None)
    if most is None or grown[most] <= 0:
        return ""
    return f"; {most.removeprefix('time/')} takes {grown[most]:.3g} s more"


def masks(grpo: GrpoConfig) -> str:
    """The settings that may leave tokens out of the loss."""
    values = {
        "rollout_is": grpo.rollout_is if grpo.rollout_is.endswith("_mask") else None,
        "rollout_rs": None if grpo.rollout_rs == "none" else grpo.rollout_rs,
        "rollout_token_veto_threshold": grpo.rollout_token_veto_threshold,
        "rollout_token_veto_threshold_high": grpo.rollout_token_veto_threshold_high,
        "off_policy_mask_threshold": grpo.off_policy_mask_threshold,
    }
    found = [f"grpo.{name} = {value}" for name, value in values.items() if value is not None]
    return " and ".join(found)
