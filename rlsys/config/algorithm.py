"""The names that the `grpo` section may use, and the settings that each loss name stands for."""

from __future__ import annotations

from typing import Literal, NamedTuple

Aggregation = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
]

Level = Literal["token", "sequence", "sequence_token"]


class LossSettings(NamedTuple):
    """What a loss name stands for; a field of `grpo` with the same name wins where it is set."""

    loss_aggregation: Aggregation
    """How the paper averages token losses over an optimizer step."""
    importance_sampling_level: Level = "token"
    """Level of the ratio."""
    delta: float | None = None
    """Upper bound of the ratio, for the clipped losses where the advantage is negative."""


PRESETS: dict[str, LossSettings] = {
    # One clipped surrogate: these differ by their settings only.
    "grpo": LossSettings("seq_mean_token_mean"),
    "bnpo": LossSettings("token_mean"),
    "dapo": LossSettings("token_mean"),
    "dr_grpo": LossSettings("seq_mean_token_sum_norm"),
    "dual_clip": LossSettings("seq_mean_token_mean", delta=3.0),  # c of arXiv:1912.09729
    "gspo": LossSettings("seq_mean_token_mean", "sequence"),
    "luspo": LossSettings("seq_mean_token_sum", "sequence"),
    "clip_cov": LossSettings("token_mean"),
    # Losses of their own.
    "cispo": LossSettings("token_mean"),
    "sapo": LossSettings("seq_mean_token_mean"),
    "vespo": LossSettings("token_mean"),
    "gmpo": LossSettings("seq_mean_token_mean"),
    "dppo_tv": LossSettings("token_mean", delta=20.0),  # verl's
    "dppo_kl": LossSettings("token_mean", delta=20.0),
    "kl_cov": LossSettings("token_mean"),
    "reinforce": LossSettings("seq_mean_token_sum"),
    "sft": LossSettings("seq_mean_token_mean"),
}
"""Every built-in loss. A user's own loss has the settings of grpo."""

GKD = "gkd"
"""The loss of distillation, which no config of GRPO can name."""
WARM_START_LOSSES = ("sft",)
"""Losses that ignore rewards; `grpo.loss_type` refuses them."""
CLIPPED_LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo", "dual_clip", "gspo", "luspo", "clip_cov")
"""Losses with the clipped surrogate."""
COVARIANCE_LOSSES = ("clip_cov", "kl_cov")
"""Losses that treat tokens of high covariance apart, chosen from log-probs before the update."""

_DIVERGENCE_LOSSES = ("dppo_tv", "dppo_kl")
_EPSILON_LOSSES = (*CLIPPED_LOSSES, *_DIVERGENCE_LOSSES, "cispo", "gmpo")
LOSSES_OF_FIELD = {
    "importance_sampling_level": (*CLIPPED_LOSSES, "cispo", "sapo"),
    "delta": (*CLIPPED_LOSSES, *_DIVERGENCE_LOSSES),
    "epsilon_low": _EPSILON_LOSSES,
    "epsilon_high": _EPSILON_LOSSES,
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
    "clip_cov_ratio": ("clip_cov",),
    "clip_cov_lb": ("clip_cov",),
    "clip_cov_ub": ("clip_cov",),
    "kl_cov_ratio": ("kl_cov",),
    "ppo_kl_coef": ("kl_cov",),
}
"""Fields of `grpo` that only some of the built-in losses read."""

LOSSES_ELSEWHERE = {
    "ppo": "grpo",
    "ppo_clip": "grpo",
    "vanilla": "grpo",
    "geo_mean": "gmpo",
    "dppo": "dppo_tv",
}
"""A loss's name in OpenRLHF or verl -> its name here."""

RolloutCorrection = Literal[
    "auto",
    "none",
    "token",
    "sequence",
    "geometric",
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
]
"""`grpo.rollout_is`: TRL's vllm_importance_sampling_mode; a level alone truncates."""
RolloutRejection = Literal[
    "none",
    "token",
    "sequence",
    "geometric",
    "token_k2",
    "token_k3",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
]
"""`grpo.rollout_rs`: weights by level, or verl's divergences."""

ADVANTAGE_ESTIMATORS = (
    "grpo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "maxrl",
)
"""Built-in advantage estimators."""
