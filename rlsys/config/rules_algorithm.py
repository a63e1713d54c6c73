"""What a config of the algorithm means, and the combinations that mean nothing or cannot be right.

Torch-free: `rlsys explain` reads it in its first second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rlsys.algo.names import (
    ADVANTAGE_ESTIMATORS,
    CLIPPED_LOSSES,
    DEFAULT_AGGREGATION,
    DEFAULT_DELTA,
    LOSSES_ELSEWHERE,
    LOSSES_OF_FIELD,
    SEQUENCE_LOSSES,
    WARM_START_LOSSES,
    aggregation_of,
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
    if grpo.loss_type in WARM_START_LOSSES:
        yield Problem(
            f"grpo.loss_type = {grpo.loss_type} imitates completions whatever they earn, it is for "
            "warm starts: use grpo, or see docs/algorithm.md",
            ("grpo.loss_type",),
        )
    if grpo.external_plugins:
        return  # which may register any name; preflight looks
    loss, estimator = grpo.loss_type, grpo.advantage_estimator
    for field, name, meant, known in (
        ("loss_type", loss, LOSSES_ELSEWHERE.get(loss.lower(), loss), list(DEFAULT_AGGREGATION)),
        ("advantage_estimator", estimator, estimator, list(ADVANTAGE_ESTIMATORS)),
    ):
        if name not in known:
            offered = [other for other in known if other not in WARM_START_LOSSES]
            yield Problem(
                f"grpo.{field} = {name} is not known.{did_you_mean(meant, offered)} Known: "
                f"{', '.join(offered)}. For one of your own, name its file in "
                "grpo.external_plugins",
                (f"grpo.{field}",),
            )


def _advantage_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    estimator = grpo.advantage_estimator
    if grpo.multi_objective_aggregation == "normalize_then_sum":
        if estimator != "grpo":
            yield Problem(
                "grpo.multi_objective_aggregation = normalize_then_sum (GDPO) normalizes each "
                f"reward within its group, which grpo.advantage_estimator = {estimator} does not: "
                "use advantage_estimator grpo",
                ("grpo.multi_objective_aggregation", "grpo.advantage_estimator"),
            )
        if grpo.scale_rewards != "auto":
            yield Problem(
                "grpo.multi_objective_aggregation = normalize_then_sum (GDPO) scales each reward "
                f"by its group and their sum by the batch, so grpo.scale_rewards = "
                f"{grpo.scale_rewards} has no place: use auto",
                ("grpo.multi_objective_aggregation", "grpo.scale_rewards"),
            )
        if grpo.kl_in_reward:
            yield Problem(
                "grpo.kl_in_reward subtracts the KL from the sum of rewards, which "
                "grpo.multi_objective_aggregation = normalize_then_sum never compares: put the KL "
                "into the loss (kl_in_reward false)",
                ("grpo.multi_objective_aggregation", "grpo.kl_in_reward"),
            )
    if estimator == "maxrl":
        for field, value, usual in (
            ("scale_rewards", grpo.scale_rewards, "auto"),
            ("kl_in_reward", grpo.kl_in_reward, False),
        ):
            if value != usual:
                yield Problem(
                    "grpo.advantage_estimator = maxrl divides by the mean reward of the group, so "
                    f"grpo.{field} = {str(value).lower()} has no place: leave it out",
                    ("grpo.advantage_estimator", f"grpo.{field}"),
                )
    if estimator.startswith("reinforce_plus_plus") and grpo.scale_rewards != "auto":
        yield Problem(
            f"grpo.advantage_estimator = {estimator} scales by all tokens of the batch, so "
            f"grpo.scale_rewards = {grpo.scale_rewards} has no place: use auto",
            ("grpo.advantage_estimator", "grpo.scale_rewards"),
        )


def _ratio_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    loss, level = grpo.loss_type, grpo.importance_sampling_level
    built_in = loss in DEFAULT_AGGREGATION
    for field, readers in LOSSES_OF_FIELD.items():
        value = getattr(grpo, field)
        if built_in and loss not in readers and value != type(grpo).model_fields[field].default:
            yield Problem(
                f"grpo.{field} = {value} is for grpo.loss_type {', '.join(readers)}, not for "
                f"{loss}: leave it out",
                (f"grpo.{field}", "grpo.loss_type"),
            )
    if loss in SEQUENCE_LOSSES and level == "token":
        yield Problem(
            f"grpo.loss_type = {loss} is the loss of sequence ratios, so "
            "grpo.importance_sampling_level = token contradicts it: use loss_type grpo",
            ("grpo.importance_sampling_level", "grpo.loss_type"),
        )
    yield from _aggregation_problems(grpo)
    delta = grpo.delta_in_effect
    _, high = grpo.clip_range
    if loss in CLIPPED_LOSSES and delta is not None and delta <= high:
        yield Problem(
            f"grpo.delta = {delta:g} is not above the upper clip bound of {high:g} "
            "(1 + grpo.epsilon_high), so it would undo the clip of good tokens: use a larger one, "
            f"such as {max(DEFAULT_DELTA['dual_clip'], high + 1):g}, or a smaller epsilon_high",
            ("grpo.delta", "grpo.epsilon_high", "grpo.epsilon"),
        )
    if grpo.clip_cov_lb >= grpo.clip_cov_ub:
        yield Problem(
            f"grpo.clip_cov_lb = {grpo.clip_cov_lb:g} is not below grpo.clip_cov_ub = "
            f"{grpo.clip_cov_ub:g}, so no token is between them: use a lower clip_cov_lb",
            ("grpo.clip_cov_lb", "grpo.clip_cov_ub"),
        )
    if loss == "vespo" and grpo.corrects_rollouts and not grpo.rollout_is.startswith("token"):
        yield Problem(
            f"grpo.loss_type = vespo multiplies the weights of all tokens of a sequence, so "
            f"grpo.rollout_is = {grpo.rollout_is} would count each of them many times: use "
            "rollout_is token",
            ("grpo.loss_type", "grpo.rollout_is"),
        )


def _aggregation_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    loss = grpo.loss_type
    aggregation = aggregation_of(loss, grpo.loss_aggregation)
    level = level_of(grpo)
    expected = "seq_mean_token_sum" if loss == "luspo" else "seq_mean_token_mean"
    of_sequences = loss == "gmpo" or (level != "token" and loss in CLIPPED_LOSSES)
    if of_sequences and aggregation != expected:
        paper = {"luspo": "2602.05261", "gmpo": "2507.20673"}.get(loss, "2507.18071")
        yield Problem(
            f"grpo.loss_type = {loss} with the ratio of a sequence averages by {aggregation}, "
            "which counts a sequence by its length where its paper counts sequences "
            f"(arXiv:{paper}): use loss_aggregation {expected}"
            + ("" if loss in (*SEQUENCE_LOSSES, "gmpo") else " with loss_type gspo"),
            ("grpo.loss_type", "grpo.importance_sampling_level", "grpo.loss_aggregation"),
        )


def _kl_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    if grpo.beta == 0:
        return
    if grpo.kl_in_reward and grpo.use_bias_correction_kl:
        yield Problem(
            "grpo.use_bias_correction_kl is about the gradient of a KL in the loss, but with "
            "grpo.kl_in_reward it is in the reward, which has none: leave one of them out",
            ("grpo.kl_in_reward", "grpo.use_bias_correction_kl"),
        )
    if grpo.kl_estimator == "k1" and not grpo.kl_in_reward and not grpo.use_bias_correction_kl:
        yield Problem(
            "grpo.kl_estimator = k1 in the loss has a gradient of mean 0, it would hold the policy "
            "nowhere (arXiv:2510.01555): use k2 or k3, or set use_bias_correction_kl or "
            "kl_in_reward",
            ("grpo.kl_estimator", "grpo.kl_in_reward", "grpo.use_bias_correction_kl"),
        )


def _off_policy_problems(config: Config) -> Iterator[Problem]:
    grpo = config.grpo
    if grpo.old_logprobs == "rollout":
        if grpo.corrects_rollouts or grpo.rejects_rollouts:
            yield Problem(
                "grpo.old_logprobs = rollout puts the rollout engine's log-probs in place of the "
                "policy's, so their ratio, which grpo.rollout_is and grpo.rollout_rs correct for, "
                "is 1: leave those out, or use old_logprobs auto",
                (
                    *("grpo.old_logprobs", "grpo.rollout_is", "grpo.rollout_rs"),
                    "grpo.rollout_token_veto_threshold",
                ),
            )
        if grpo.top_entropy_quantile < 1:
            yield Problem(
                f"grpo.top_entropy_quantile = {grpo.top_entropy_quantile:g} needs the policy's "
                "entropies before the update, which grpo.old_logprobs = rollout does not compute: "
                "use old_logprobs auto",
                ("grpo.old_logprobs", "grpo.top_entropy_quantile"),
            )
    yield from _bound_problems(grpo)
    staleness = config.rollout.max_staleness
    if staleness and grpo.loss_type == "reinforce" and grpo.rollout_is == "none":
        yield Problem(
            f"grpo.loss_type = reinforce has no ratio, and rollout.max_staleness = {staleness} "
            "gives it completions of older weights, for which grpo.rollout_is = none does not "
            "correct: leave rollout_is at auto, or set max_staleness 0",
            ("grpo.loss_type", "grpo.rollout_is", "rollout.max_staleness"),
        )
    if grpo.loss_type == "reinforce" and config.optimizer_steps_per_rollout > 1:
        yield Problem(
            "grpo.loss_type = reinforce has no ratio, so all but the first of the "
            f"{config.optimizer_steps_per_rollout} optimizer steps a rollout would be off-policy "
            "without correction: make policy.global_batch_size the generation_batch_size and "
            "num_iterations 1, or use loss_type grpo",
            (
                *("grpo.loss_type", "grpo.num_iterations"),
                *("policy.global_batch_size", "rollout.generation_batch_size"),
            ),
        )


def _bound_problems(grpo: GrpoConfig) -> Iterator[Problem]:
    """Bounds of the correction that contradict each other, or that nothing would read."""
    least, most = grpo.rollout_is_threshold_lower, grpo.rollout_is_threshold
    if least is not None and least >= most:
        yield Problem(
            f"grpo.rollout_is_threshold_lower = {least:g} is not below rollout_is_threshold = "
            f"{most:g}: use a lower one",
            ("grpo.rollout_is_threshold_lower", "grpo.rollout_is_threshold"),
        )
    rejection, threshold = grpo.rollout_rs, grpo.rollout_rs_threshold
    fields = ("grpo.rollout_rs", "grpo.rollout_rs_threshold")
    if rejection[-2:] in ("k2", "k3"):
        if threshold is None:
            yield Problem(
                f"grpo.rollout_rs = {rejection} needs grpo.rollout_rs_threshold: set the greatest "
                "divergence that is kept, such as 0.01",
                fields,
            )
        if grpo.rollout_rs_threshold_lower is not None:
            yield Problem(
                f"grpo.rollout_rs = {rejection} is a divergence, which has an upper bound only: "
                "leave grpo.rollout_rs_threshold_lower out",
                ("grpo.rollout_rs", "grpo.rollout_rs_threshold_lower"),
            )
    elif threshold is not None and threshold < 1:
        yield Problem(
            f"grpo.rollout_rs_threshold = {threshold:g} would leave out tokens on which policy and "
            "rollout engine agree, their weight is 1: use 1 or more",
            fields,
        )


def level_of(grpo: GrpoConfig) -> str:
    """The importance_sampling_level in effect."""
    default = "sequence" if grpo.loss_type in SEQUENCE_LOSSES else "token"
    return grpo.importance_sampling_level or default


RECIPES = {
    ("grpo", "grpo"): "GRPO",
    ("grpo", "bnpo"): "GRPO averaged over tokens (TRL's bnpo)",
    ("grpo", "dapo"): "DAPO",
    ("grpo", "dr_grpo"): "Dr. GRPO",
    ("grpo", "dual_clip"): "GRPO with dual clip",
    ("grpo", "gspo"): "GSPO",
    ("grpo", "luspo"): "LUSPO",
    ("grpo", "cispo"): "CISPO",
    ("grpo", "sapo"): "SAPO",
    ("grpo", "vespo"): "VESPO",
    ("grpo", "gmpo"): "GMPO",
    ("grpo", "dppo_tv"): "DPPO (binary TV)",
    ("grpo", "dppo_kl"): "DPPO (binary KL)",
    ("grpo", "clip_cov"): "GRPO with Clip-Cov",
    ("grpo", "kl_cov"): "GRPO with KL-Cov",
    ("maxrl", "reinforce"): "MaxRL",
    ("maxrl", "dapo"): "MaxRL",
    ("rloo", "reinforce"): "RLOO",
    ("reinforce_plus_plus", "bnpo"): "REINFORCE++",
    ("reinforce_plus_plus_baseline", "bnpo"): "REINFORCE++ with the group's mean as baseline",
}
"""(advantage_estimator, loss_type) of what has a name."""


def describe_algorithm(config: Config) -> list[tuple[str, str]]:
    """(part, what it is) of the algorithm that a config amounts to."""
    grpo = config.algorithm
    return [
        ("algorithm", _name(grpo)),
        ("advantages", _advantages_text(grpo)),
        ("loss", _loss_text(config)),
        ("KL to the reference", _kl_text(grpo)),
        ("old_logprobs", _old_text(config)),
        ("off-policy correction", _correction_text(grpo)),
    ]


def _name(grpo: GrpoConfig) -> str:
    if grpo.multi_objective_aggregation == "normalize_then_sum":
        return f"GDPO's advantages with loss_type {grpo.loss_type}"
    name = RECIPES.get((grpo.advantage_estimator, grpo.loss_type))
    if name is None:
        return f"{grpo.advantage_estimator} advantages with the loss {grpo.loss_type}"
    if grpo.loss_type == "dr_grpo" and grpo.scale_rewards != "none":
        return "Dr. GRPO's loss with GRPO's advantages (the paper has scale_rewards none)"
    return name


def _advantages_text(grpo: GrpoConfig) -> str:
    if grpo.multi_objective_aggregation == "normalize_then_sum":
        text = "each reward less its group's mean / std, weighted sum, normalized over the batch"
    else:
        known = {
            "grpo": "reward less the mean of its group",
            "rloo": "reward less the mean of the others of its group",
            "maxrl": "reward less the mean of its group, / that mean",
            "reinforce_plus_plus": "reward, normalized over all tokens of the batch",
            "reinforce_plus_plus_baseline": "reward less the mean of its group, normalized over "
            "all tokens of the batch",
        }
        text = known.get(grpo.advantage_estimator, grpo.advantage_estimator)
        scale = grpo.scale_rewards
        if scale == "auto":
            scale = "group" if grpo.advantage_estimator == "grpo" else "none"
        if scale != "none":
            text += f", / (std of the {scale} + {grpo.advantage_eps:g})"
    if grpo.mask_truncated_completions:
        text += "; completions cut at the length limit are not trained on"
    return text


def _cispo_text(grpo: GrpoConfig) -> str:
    low, high = grpo.clip_range
    least = "" if grpo.epsilon_low is None else f"at least {low:g}, "
    return f": weight of each {level_of(grpo)} {least}at most {high:g}"


def _divergence_text(grpo: GrpoConfig) -> str:
    low, high = grpo.epsilons
    what = "probability" if grpo.loss_type == "dppo_tv" else "binary KL"
    return (
        f": left out where its {what} went up by {high:g} or down by {low:g}; ratio at most "
        f"{grpo.delta_in_effect:g}"
    )


def _gmpo_text(grpo: GrpoConfig) -> str:
    low, high = grpo.epsilons
    return f": geometric mean of ratios clipped to [exp(-{low:g}), exp({high:g})]"


_OTHER_LOSS_TEXT: dict[str, Callable[[GrpoConfig], str]] = {
    "cispo": _cispo_text,
    "dppo_tv": _divergence_text,
    "dppo_kl": _divergence_text,
    "gmpo": _gmpo_text,
    "sapo": lambda grpo: (
        f": ratio of the {level_of(grpo)}, gate of temperature {grpo.sapo_temperature_pos:g} for "
        f"good ones, {grpo.sapo_temperature_neg:g} for bad ones"
    ),
    "vespo": lambda grpo: (
        f": weight w^k exp(lambda (1 - w)) of the sequence, k {grpo.vespo_k_pos:g} and lambda "
        f"{grpo.vespo_lambda_pos:g} for good ones, {grpo.vespo_k_neg:g} and "
        f"{grpo.vespo_lambda_neg:g} for bad ones"
    ),
    "kl_cov": lambda grpo: (
        f": unclipped, {grpo.ppo_kl_coef:g} x abs(log ratio) for the {grpo.kl_cov_ratio:g} of "
        "tokens with the highest covariance"
    ),
}


def _loss_text(config: Config) -> str:
    grpo = config.algorithm
    low, high = grpo.clip_range
    text = grpo.loss_type
    if text in CLIPPED_LOSSES:
        text += f": ratio of the {level_of(grpo)}, clipped to [{low:g}, {high:g}]"
        delta = grpo.delta_in_effect
        text += f" and at {delta:g} for bad ones" if delta else ""
        if text.startswith("clip_cov"):
            text += (
                f"; without {grpo.clip_cov_ratio:g} of the tokens, of those of covariance "
                f"{grpo.clip_cov_lb:g} to {grpo.clip_cov_ub:g}"
            )
    else:
        text += _OTHER_LOSS_TEXT.get(text, lambda grpo: "")(grpo)
    text += f"; {aggregation_of(grpo.loss_type, grpo.loss_aggregation)}"
    if grpo.top_entropy_quantile < 1:
        text += f"; only the {grpo.top_entropy_quantile:.0%} of tokens with the highest entropy"
    if grpo.entropy_coef:
        text += f"; entropy bonus {grpo.entropy_coef:g}"
    return text


def _kl_text(grpo: GrpoConfig) -> str:
    if grpo.beta == 0:
        return "none (beta 0)"
    if grpo.kl_in_reward:
        return f"{grpo.beta:g} x {grpo.kl_estimator or 'k1'}, subtracted from the reward"
    corrected = ", times the ratio" if grpo.use_bias_correction_kl else ""
    return f"{grpo.beta:g} x {grpo.kl_estimator or 'k3'}{corrected}, added to the loss"


def _old_text(config: Config) -> str:
    if config.grpo.old_logprobs == "rollout":
        return "the rollout engine's"
    if config.recompute_old_logprobs:
        return "computed by the policy before the update, a forward pass"
    return "not computed: with one optimizer step a rollout they are those of the update"


_LEVEL_TEXT = {
    "token": "token",
    "sequence": "sequence",
    "geometric": "sequence (geometric mean)",
}


def _correction_text(grpo: GrpoConfig) -> str:
    parts = []
    if grpo.corrects_rollouts:
        level, _, bound = grpo.rollout_is.partition("_")
        least = grpo.rollout_is_threshold_lower
        bounds = f"at least {least:g}, " if least is not None else ""
        bounds += f"at most {grpo.rollout_is_threshold:g}"
        parts.append(
            f"weight old policy / rollout engine of the {_LEVEL_TEXT[level]}, {bounds}"
            + (", 0 beyond" if bound == "mask" else "")
        )
    if grpo.rollout_rs != "none":
        lower, upper = grpo.rollout_rs_bounds
        what = "token" if grpo.rollout_rs.startswith("token") else "completion"
        if grpo.rollout_rs in _LEVEL_TEXT:
            mean = " (geometric mean)" if grpo.rollout_rs == "geometric" else ""
            out = f"weight{mean} is outside [{lower:g}, {upper:g}]"
        else:
            out = f"{grpo.rollout_rs} is above {upper:g}"
        parts.append(f"a {what} whose {out} is left out")
    for veto, side in (
        (grpo.rollout_token_veto_threshold, "below"),
        (grpo.rollout_token_veto_threshold_high, "above"),
    ):
        if veto is not None:
            parts.append(f"a completion with a token of weight {side} {veto:g} is left out")
    if grpo.off_policy_mask_threshold is not None:
        parts.append(
            f"bad completions that fell by {grpo.off_policy_mask_threshold:g} nats a token are "
            "left out"
        )
    return "; ".join(parts) or "none"
