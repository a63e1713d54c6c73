"""The algorithm of a config in words, for `rlsys explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlsys.config.algorithm import CLIPPED_LOSSES

if TYPE_CHECKING:
    from rlsys.config import Config, GrpoConfig


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
"""(advantage_estimator, loss_type) -> the pair's name."""


def describe_algorithm(config: Config) -> list[tuple[str, str]]:
    """(part, description) for each part of the algorithm."""
    grpo = config.algorithm
    return [
        ("algorithm", _name(grpo)),
        ("advantages", _advantages_text(grpo)),
        ("loss", _loss_text(config)),
        ("KL to the reference", _kl_text(grpo)),
        *_teacher_pair(config),
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
    (_, level, _), (low, high) = grpo.loss_settings, grpo.clip_range
    least = "" if grpo.epsilon_low is None else f"at least {low:g}, "
    return f": weight of each {level} {least}at most {high:g}"


def _divergence_text(grpo: GrpoConfig) -> str:
    low, high = grpo.epsilons
    what = "probability" if grpo.loss_type == "dppo_tv" else "binary KL"
    return (
        f": left out where its {what} went up by {high:g} or down by {low:g}; ratio at most "
        f"{grpo.loss_settings.delta:g}"
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
        f": ratio of the {grpo.loss_settings.importance_sampling_level}, gate of temperature "
        f"{grpo.sapo_temperature_pos:g} for good ones, {grpo.sapo_temperature_neg:g} for bad ones"
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
    text, (aggregation, level, delta) = grpo.loss_type, grpo.loss_settings
    if text in CLIPPED_LOSSES:
        text += f": ratio of the {level}, clipped to [{low:g}, {high:g}]"
        text += f" and at {delta:g} for bad ones" if delta else ""
        if text.startswith("clip_cov"):
            text += (
                f"; without {grpo.clip_cov_ratio:g} of the tokens, drawn at covariance "
                f"{grpo.clip_cov_lb:g} to {grpo.clip_cov_ub:g}"
            )
    else:
        text += _OTHER_LOSS_TEXT.get(text, lambda grpo: "")(grpo)
    text += f"; {aggregation}"
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


def _teacher_pair(config: Config) -> list[tuple[str, str]]:
    """On-policy distillation, if the run has a teacher."""
    if config.used_teacher is None:
        return []
    own = "policy's" if config.recompute_old_logprobs else "rollout engine's"
    text = f"advantages + {config.grpo.opd_kl_coef:g} x (log-prob of {config.teacher.path} - {own})"
    return [("teacher", text)]


def _old_text(config: Config) -> str:
    if config.grpo.old_logprobs == "rollout":
        return "the rollout engine's"
    if config.recompute_old_logprobs:
        return "computed by the policy before the update, a forward pass"
    return "not computed: with one optimizer step per rollout the update computes them"


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
            f"bad completions that fell by {grpo.off_policy_mask_threshold:g} nats per token are "
            "left out"
        )
    return "; ".join(parts) or "none"
