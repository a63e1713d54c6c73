"""Whether completions come from the policy that is trained, and whether steps train at all.

What `rlsys doctor --canary` proves with a run of its own, a run shows as far as its metrics can
tell: a run that fails here ends with status 0 and a model that has learned nothing.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator

from rlsys.config import Config, GrpoConfig
from rlsys.problems import RunFailed
from rlsys.tracking.base import Metrics

MAX_DIFFERENCE_OF_DTYPE = {"float32": 1e-4, "bfloat16": 0.1}
"""Mean of |log-prob of policy - log-prob of engine|, in nats, that rounding explains."""
MAX_KL_OF_DTYPE = {"float32": 1e-6, "bfloat16": 1e-2}
"""KL of a policy to its twin, k3: in bfloat16 2e-3 was measured between trainer and engine."""
NEARLY_ALL = 0.95
"""Share of tokens without a policy gradient with which a step trains nothing."""
NO_ADVANTAGE = 1e-8
"""Advantages are 0 up to here."""
MAX_EMPTY_STEPS = 3
"""Such steps in a row end the run."""


class TrainingStopped(RunFailed):
    """Going on would train nothing, or another policy than the one that samples."""


class SamplingWatch:
    """Reads the metrics of each training step of this process.

    Args:
        config: of the run.
        dtype: of the weights.
    """

    def __init__(self, config: Config, *, dtype: str):
        self._config, self._dtype = config, dtype
        self._told: set[str] = set()
        self._empty_steps = 0
        self._is_first = True
        self._steps: list[int] = []
        self._has_advantages = False

    def observe(self, step: int, metrics: Metrics) -> list[str]:
        """The warnings that are new.

        Raises:
            TrainingStopped: policy and engine differ by more than grpo.max_logp_difference, or
                several steps in a row trained nothing.
        """
        self._steps.append(step)
        advantage = metrics.get("advantages/abs_max")
        self._has_advantages |= not isinstance(advantage, float) or advantage > NO_ADVANTAGE
        found = dict(self._differences(step, metrics))
        self._is_first = False
        empty = self._empty(step, metrics)
        if empty is None:
            self._empty_steps = 0
        else:
            found["empty"] = empty
            self._empty_steps += 1
            if self._empty_steps == MAX_EMPTY_STEPS:
                raise TrainingStopped(f"{MAX_EMPTY_STEPS} steps in a row trained nothing: {empty}")
        new = {topic: text for topic, text in found.items() if topic not in self._told}
        self._told |= new.keys()
        return list(new.values())

    def nothing_learned(self) -> str | None:
        """Why the steps so far taught nothing; None if one of them had an advantage."""
        if self._has_advantages or not self._steps:
            return None
        return (
            f"nothing was learned from rewards: in no step from {self._steps[0]} to "
            f"{self._steps[-1]} did a group have completions with different rewards "
            "(frac_reward_zero_std). Read them with "
            f"`rlsys completions {shlex.quote(self._config.output_dir)}`: all problems are too "
            "hard or too easy, or a reward function does not see what it should pay for"
        )

    def _differences(self, step: int, metrics: Metrics) -> Iterator[tuple[str, str]]:
        """Where one model computes differently in two places; later steps may be stale."""
        if not self._is_first and self._config.rollout.max_staleness:
            return
        difference = metrics.get("sampling/logp_difference/mean")
        if isinstance(difference, float):
            # A temperature below 1 stretches logits, and what they differ by.
            stretch = max(1.0, 1 / self._config.rollout.temperature)
            rounding = MAX_DIFFERENCE_OF_DTYPE[self._dtype] * stretch
            text = self._difference_text(step, difference, rounding)
            bound = self._config.grpo.max_logp_difference
            if bound is not None and not difference <= bound:
                raise TrainingStopped(
                    f"{text} This is above grpo.max_logp_difference = {bound:g}, which ends the "
                    "run; null never does."
                )
            if not difference <= rounding:
                yield "difference", text
        kl = metrics.get("kl")
        if self._starts_at_reference(step) and isinstance(kl, float):
            limit = MAX_KL_OF_DTYPE[self._dtype]
            if not abs(kl) <= limit:
                yield (
                    "kl",
                    f"kl is {kl:.3g} at step 1, where policy and reference have the same weights "
                    f"and rounding in {self._dtype} explains {limit:g}: one of them does not "
                    "compute what its files say. `rlsys doctor --canary CONFIG` looks closer.",
                )

    def _starts_at_reference(self, step: int) -> bool:
        config = self._config
        same = config.reference_path == config.model.path
        return step == 1 and same and config.optimizer_steps_per_rollout == 1

    def _difference_text(self, step: int, difference: float, rounding: float) -> str:
        return (
            f"log-probs of policy and rollout engine differ by {difference:.3g} nats a token at "
            f"step {step} (sampling/logp_difference/mean), and rounding in {self._dtype} explains "
            f"{rounding:g}: completions are not sampled from the policy that is trained. Likely "
            "causes: a model whose config.json one of both reads differently, weights that did not "
            "arrive, quantized or low-precision kernels. `rlsys doctor --canary CONFIG` and "
            "docs/debugging.md look closer."
        )

    def _empty(self, step: int, metrics: Metrics) -> str | None:
        """Why a step trained nothing; None if it did, or if no completion had a reward.

        Without rewards the reward watch warns, and reward.on_error decides.
        """
        reward, grpo = metrics.get("reward"), self._config.grpo
        if isinstance(reward, float) and math.isnan(reward):
            return None
        if metrics.get("num_loss_tokens") == 0:
            reason = (
                f"all completions were cut at rollout.max_completion_length = "
                f"{self._config.rollout.max_completion_length} and "
                "grpo.mask_truncated_completions leaves those out: raise the length"
                if grpo.mask_truncated_completions
                else "no completion has a token to train on: read them with `rlsys completions`"
            )
            return f"step {step} trained nothing, {reason}"
        masked = metrics.get("sampling/masked_fraction")
        if not isinstance(masked, float) or masked < NEARLY_ALL:
            return None
        difference = metrics.get("sampling/logp_difference/mean", math.nan)
        return (
            f"step {step} trained next to nothing, {_what_leaves_out(grpo)} left out {masked:.1%} "
            f"of its tokens; policy and rollout engine differ by {difference:.3g} nats a token. "
            "Where that is large, see docs/debugging.md; where it is small, widen the threshold, "
            "or use token or geometric weights, as the ratio of a whole completion multiplies "
            "those of its tokens"
        )


def _what_leaves_out(grpo: GrpoConfig) -> str:
    """The settings that may leave tokens out of a step."""
    values = {
        "rollout_is": grpo.rollout_is if grpo.rollout_is.endswith("_mask") else None,
        "rollout_rs": None if grpo.rollout_rs == "none" else grpo.rollout_rs,
        "rollout_token_veto_threshold": grpo.rollout_token_veto_threshold,
        "rollout_token_veto_threshold_high": grpo.rollout_token_veto_threshold_high,
        "off_policy_mask_threshold": grpo.off_policy_mask_threshold,
    }
    found = [f"grpo.{name} = {value}" for name, value in values.items() if value is not None]
    return " and ".join(found)
