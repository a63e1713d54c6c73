"""Warnings if completions do not come from the policy that is trained, or if steps train nothing.

Without them such a run would end with status 0 and a model that has learned nothing. `rlsys doctor
--canary` proves the same with a run of its own.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator

from rlsys.config import Config, GrpoConfig
from rlsys.problems import RunFailed
from rlsys.tracking.base import Metrics, is_evaluation
from rlsys.tracking.watch import Watch

MAX_DIFFERENCE_OF_DTYPE = {"float32": 1e-4, "bfloat16": 0.1, "FP8": 0.5}
"""Mean of |log-prob of policy - log-prob of engine|, in nats, that rounding explains. FP8: a random
model of 4 layers had 9 times the difference of bfloat16, with rounding as the engine's, on CPU."""
MAX_KL_OF_DTYPE = {"float32": 1e-6, "bfloat16": 1e-2}
"""KL (k3) between two models of the same weights; 2e-3 was measured in bfloat16."""
NEARLY_ALL = 0.95
"""A step trains nothing if this share of its tokens has no policy gradient."""
NO_ADVANTAGE = 1e-8
"""Advantages up to this size count as 0."""
MAX_EMPTY_STEPS = 3
"""The run ends after this many steps in a row that train nothing."""


class TrainingStopped(RunFailed):
    """The run must stop: it trains nothing, or another policy than the one that samples."""


class SamplingWatch(Watch):
    """Warns if policy and engine compute differently, and if steps train nothing.

    Args:
        config: of the run.
        dtype: type of the weights.
    """

    def __init__(self, config: Config, *, dtype: str):
        super().__init__()
        self._config, self._dtype = config, dtype
        self._empty_steps = 0
        self._steps: list[int] = []
        self._has_advantages = False

    def _find(self, step: int, metrics: Metrics) -> Iterator[tuple[str, str]]:
        """Problems of a training step.

        Raises:
            TrainingStopped: policy and engine differ by more than grpo.max_logp_difference, or
                several steps in a row trained nothing.
        """
        if is_evaluation(metrics):
            return
        advantage = metrics.get("advantages/abs_max")
        self._has_advantages |= not isinstance(advantage, float) or advantage > NO_ADVANTAGE
        # Later steps may have stale completions, which are from another policy.
        if not (self._steps and self._config.rollout.max_staleness):
            yield from self._differences(step, metrics)
        self._steps.append(step)
        empty = self._empty(step, metrics)
        self._empty_steps = 0 if empty is None else self._empty_steps + 1
        if self._empty_steps == MAX_EMPTY_STEPS:
            raise TrainingStopped(f"{MAX_EMPTY_STEPS} steps in a row trained nothing: {empty}")
        if empty is not None:
            yield "empty", empty

    def nothing_learned(self) -> str | None:
        """Why the steps so far taught nothing; None if one of them had an advantage."""
        if self._has_advantages or not self._steps:
            return None
        return (
            f"nothing was learned from rewards: in no step from {self._steps[0]} to "
            f"{self._steps[-1]} did a group have completions with different rewards "
            "(frac_reward_zero_std). Read them with "
            f"`rlsys completions {shlex.quote(self._config.output_dir)}`: all problems are too "
            "hard or too easy, or a reward function does not see what it should reward"
        )

    def _differences(self, step: int, metrics: Metrics) -> Iterator[tuple[str, str]]:
        """Warnings that one model computes differently in two processes."""
        difference = metrics.get("sampling/logp_difference/mean")
        if isinstance(difference, float):
            # A temperature below 1 stretches logits, and with them their differences.
            stretch = max(1.0, 1 / self._config.rollout.temperature)
            dtype = "FP8" if self._config.rollout.quantization else self._dtype
            rounding = MAX_DIFFERENCE_OF_DTYPE[dtype] * stretch
            text = _difference_text(step, difference, dtype, rounding)
            bound = self._config.grpo.max_logp_difference
            if bound is not None and not difference <= bound:
                raise TrainingStopped(
                    f"{text} This is above grpo.max_logp_difference = {bound:g}, so the run ends; "
                    "with null it would continue."
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
                    "compute what its files say. Run `rlsys doctor --canary CONFIG` to find out.",
                )

    def _starts_at_reference(self, step: int) -> bool:
        config = self._config
        same = config.reference_path == config.model.path
        return step == 1 and same and config.optimizer_steps_per_update == 1

    def _empty(self, step: int, metrics: Metrics) -> str | None:
        """Why a step trained nothing; None if it trained, or if no completion had a reward.

        RewardWatch warns of missing rewards.
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
            f"step {step} trained next to nothing, {_masks(grpo)} left out {masked:.1%} of its "
            f"tokens; policy and rollout engine differ by {difference:.3g} nats per token. If that "
            "is large, see docs/debugging.md. If it is small, widen the threshold, or use token or "
            "geometric weights: the ratio of a completion is the product of its tokens' ratios"
        )


def _difference_text(step: int, difference: float, dtype: str, rounding: float) -> str:
    return (
        f"log-probs of policy and rollout engine differ by {difference:.3g} nats per token at "
        f"step {step} (sampling/logp_difference/mean), and rounding in {dtype} explains "
        f"{rounding:g}: completions are not sampled from the policy that is trained. Likely "
        "causes: both read the model's config.json differently, weights did not arrive, or "
        "kernels are quantized or of low precision. `rlsys doctor --canary CONFIG` and "
        "docs/debugging.md help to find the cause."
    )


def _masks(grpo: GrpoConfig) -> str:
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
