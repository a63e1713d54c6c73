"""What a config of the algorithm means, and the combinations that mean nothing or cannot be right.

Torch-free: `rlsys explain` reads it in its first second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.algorithm import (
    ADVANTAGE_ESTIMATORS,
    CLIPPED_LOSSES,
    LOSSES_ELSEWHERE,
    LOSSES_OF_FIELD,
    PRESETS,
    WARM_START_LOSSES,
)
from rlsys.problems import Problem
from rlsys.registry import did_you_mean

if TYPE_CHECKING:
    from rlsys.config.schema import Config, GrpoConfig


def algorithm_problems(config: Config) -> Iterator[Problem]:
    """Every rule about the `grpo` section that `config` breaks."""
    grpo = config.grpo
    yield from _name_problems(grpo)
    yield from _advantage_problems(grpo)
    yield from _ratio_problems(grpo)
    yield from _kl_problems(grpo)
    yield from _off_policy_problems(config)


def _name_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    """Warm-start losses, and names that are not built in, unless a plugin may register them."""
    if grpo.loss_type in WARM_START_LOSSES:
        yield Problem(
            f"grpo.loss_type = {grpo.loss_type} imitates completions whatever they earn: it is for "
            "warm starts: use grpo, or see docs/algorithm.md"
        )
    if grpo.external_plugins:
        return  # which may register any name; preflight looks
    loss, estimator = grpo.loss_type, grpo.advantage_estimator
    for field, name, meant, known in (
        ("loss_type", loss, LOSSES_ELSEWHERE.get(loss.lower(), loss), list(PRESETS)),
        ("advantage_estimator", estimator, estimator, list(ADVANTAGE_ESTIMATORS)),
    ):
        if name not in known:
            offered = [other for other in known if other not in WARM_START_LOSSES]
            yield Problem(
                f"grpo.{field} = {name} is not known.{did_you_mean(meant, offered)} Known: "
                f"{', '.join(offered)}. For one of your own, name its file in "
                "grpo.external_plugins"
            )


def _advantage_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    estimator = grpo.advantage_estimator
    if grpo.multi_objective_aggregation == "normalize_then_sum":
        if estimator != "grpo":
            yield Problem(
                "grpo.multi_objective_aggregation = normalize_then_sum (GDPO) normalizes each "
                f"reward within its group, which grpo.advantage_estimator = {estimator} does not: "
                "use advantage_estimator grpo"
            )
        if grpo.scale_rewards != "auto":
            yield Problem(
                "grpo.multi_objective_aggregation = normalize_then_sum (GDPO) scales each reward "
                f"by its group and their sum by the batch, so grpo.scale_rewards = "
                f"{grpo.scale_rewards} has no place: use auto"
            )
        if grpo.kl_in_reward:
            yield Problem(
                "grpo.kl_in_reward subtracts the KL from the sum of rewards, which "
                "grpo.multi_objective_aggregation = normalize_then_sum never compares: put the KL "
                "into the loss (kl_in_reward false)"
            )
    if estimator == "maxrl":
        for field, value, usual in (
            ("scale_rewards", grpo.scale_rewards, "auto"),
            ("kl_in_reward", grpo.kl_in_reward, False),
        ):
            if value != usual:
                yield Problem(
                    "grpo.advantage_estimator = maxrl divides by the mean reward of the group, so "
                    f"grpo.{field} = {str(value).lower()} has no place: leave it out"
                )
    if estimator.startswith("reinforce_plus_plus") and grpo.scale_rewards != "auto":
        yield Problem(
            f"grpo.advantage_estimator = {estimator} scales by all tokens of the batch, so "
            f"grpo.scale_rewards = {grpo.scale_rewards} has no place: use auto"
        )


def _ratio_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    loss = grpo.loss_type
    built_in = loss in PRESETS
    for field, readers in LOSSES_OF_FIELD.items():
        value = getattr(grpo, field)
        if built_in and loss not in readers and value != type(grpo).model_fields[field].default:
            yield Problem(
                f"grpo.{field} = {value} is for grpo.loss_type {', '.join(readers)}, not for "
                f"{loss}: leave it out"
            )
    delta = grpo.loss_settings.delta
    _, high = grpo.clip_range
    if loss in CLIPPED_LOSSES and delta is not None and delta <= high:
        yield Problem(
            f"grpo.delta = {delta:g} is not above the upper clip bound of {high:g} "
            "(1 + grpo.epsilon_high or grpo.epsilon), so it would undo the clip of good tokens: "
            f"use a larger one, such as {max(3, high + 1):g}, or a smaller epsilon_high"
        )
    if grpo.clip_cov_lb >= grpo.clip_cov_ub:
        yield Problem(
            f"grpo.clip_cov_lb = {grpo.clip_cov_lb:g} is not below grpo.clip_cov_ub = "
            f"{grpo.clip_cov_ub:g}, so no token is between them: use a lower clip_cov_lb"
        )
    if loss == "vespo" and grpo.corrects_rollouts and not grpo.rollout_is.startswith("token"):
        yield Problem(
            f"grpo.loss_type = vespo multiplies the weights of all tokens of a sequence, so "
            f"grpo.rollout_is = {grpo.rollout_is} would count each of them many times: use "
            "rollout_is token"
        )


def _kl_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    if grpo.beta == 0:
        return
    if grpo.kl_in_reward and grpo.use_bias_correction_kl:
        yield Problem(
            "grpo.use_bias_correction_kl is about the gradient of a KL in the loss, but with "
            "grpo.kl_in_reward it is in the reward, which has none: leave one of them out"
        )
    if grpo.kl_estimator == "k1" and not grpo.kl_in_reward and not grpo.use_bias_correction_kl:
        yield Problem(
            "grpo.kl_estimator = k1 in the loss has a gradient of mean 0, it would hold the policy "
            "nowhere (arXiv:2510.01555): use k2 or k3, or set use_bias_correction_kl or "
            "kl_in_reward"
        )


def _off_policy_problems(config: Config) -> Iterator[Problem]:
    grpo = config.grpo
    if grpo.old_logprobs == "rollout":
        if grpo.corrects_rollouts or grpo.rejects_rollouts:
            yield Problem(
                "grpo.old_logprobs = rollout puts the rollout engine's log-probs in place of the "
                "policy's, so their ratio is 1, and grpo.rollout_is, grpo.rollout_rs and "
                "rollout_token_veto_threshold correct nothing: leave them out, or use old_logprobs "
                "auto"
            )
        if grpo.top_entropy_quantile < 1:
            yield Problem(
                f"grpo.top_entropy_quantile = {grpo.top_entropy_quantile:g} needs the policy's "
                "entropies before the update, which grpo.old_logprobs = rollout does not compute: "
                "use old_logprobs auto"
            )
    yield from _bound_problems(grpo)
    staleness = config.rollout.max_staleness
    if staleness and grpo.loss_type == "reinforce" and grpo.rollout_is == "none":
        yield Problem(
            f"grpo.loss_type = reinforce has no ratio, and rollout.max_staleness = {staleness} "
            "gives it completions of older weights, for which grpo.rollout_is = none does not "
            "correct: leave rollout_is at auto, or set max_staleness 0"
        )
    if grpo.loss_type == "reinforce" and config.optimizer_steps_per_update > 1:
        yield Problem(
            "grpo.loss_type = reinforce has no ratio, so all but the first of the "
            f"{config.optimizer_steps_per_update} optimizer steps per rollout would be off-policy "
            "without correction: make policy.global_batch_size the generation_batch_size and "
            "num_iterations 1, or use loss_type grpo"
        )


def _bound_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    """Bounds of the correction that contradict each other, or that nothing would read."""
    least, most = grpo.rollout_is_threshold_lower, grpo.rollout_is_threshold
    if least is not None and least >= most:
        yield Problem(
            f"grpo.rollout_is_threshold_lower = {least:g} is not below rollout_is_threshold = "
            f"{most:g}: use a lower one"
        )
    rejection, threshold = grpo.rollout_rs, grpo.rollout_rs_threshold
    if rejection[-2:] in ("k2", "k3"):
        if threshold is None:
            yield Problem(
                f"grpo.rollout_rs = {rejection} needs grpo.rollout_rs_threshold: set the greatest "
                "divergence that is kept, such as 0.01"
            )
        if grpo.rollout_rs_threshold_lower is not None:
            yield Problem(
                f"grpo.rollout_rs = {rejection} is a divergence, which has an upper bound only: "
                "leave grpo.rollout_rs_threshold_lower out"
            )
    elif threshold is not None and threshold < 1:
        yield Problem(
            f"grpo.rollout_rs_threshold = {threshold:g} would leave out tokens on which policy and "
            "rollout engine agree, their weight is 1: use 1 or more"
        )
