"""The names that a config may use, known without importing torch."""

from __future__ import annotations

from typing import Literal

Aggregation = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
]

DEFAULT_AGGREGATION: dict[str, Aggregation] = {
    "grpo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "dr_grpo": "seq_mean_token_sum_norm",
    "dual_clip": "seq_mean_token_mean",
    "gspo": "seq_mean_token_mean",
    "luspo": "seq_mean_token_sum",
    "cispo": "token_mean",
    "sapo": "seq_mean_token_mean",
    "vespo": "token_mean",
    "gmpo": "seq_mean_token_mean",
    "dppo_tv": "token_mean",
    "dppo_kl": "token_mean",
    "clip_cov": "token_mean",
    "kl_cov": "token_mean",
    "reinforce": "seq_mean_token_sum",
    "sft": "seq_mean_token_mean",
}
"""Of every built-in loss: how its paper averages token losses over an optimizer step."""

WARM_START_LOSSES = ("sft",)
"""Those that look at no reward, which `grpo.loss_type` refuses."""
CLIPPED_LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo", "dual_clip", "gspo", "luspo", "clip_cov")
"""Losses with the clipped surrogate, which know `delta`."""
LEVEL_LOSSES = (*CLIPPED_LOSSES, "cispo", "sapo")
"""Losses that know `importance_sampling_level`."""
SEQUENCE_LOSSES = ("gspo", "luspo")
"""Those of them whose ratio is that of the sequence unless `importance_sampling_level` is set."""
COVARIANCE_LOSSES = ("clip_cov", "kl_cov")
"""Losses that treat tokens of high covariance apart, chosen from log-probs before the update."""

DIVERGENCE_LOSSES = ("dppo_tv", "dppo_kl")
"""Losses that bound how far a token's probability moves."""
_EPSILON_LOSSES = (*CLIPPED_LOSSES, *DIVERGENCE_LOSSES, "cispo", "gmpo")
LOSSES_OF_FIELD = {
    "importance_sampling_level": LEVEL_LOSSES,
    "delta": (*CLIPPED_LOSSES, *DIVERGENCE_LOSSES),
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
"""What OpenRLHF and verl call a loss -> its name here."""

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

DEFAULT_DELTA = {"dual_clip": 3.0, "dppo_tv": 20.0, "dppo_kl": 20.0}
"""Losses that have a `delta` unless it is set: c of arXiv:1912.09729, verl's for DPPO."""

ADVANTAGE_ESTIMATORS = (
    "grpo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "maxrl",
)
"""Built-in advantage estimators."""


def aggregation_of(loss_type: str, loss_aggregation: Aggregation | None) -> Aggregation:
    """What the config asks for, else the default of the loss: for a user's own, that of grpo."""
    return loss_aggregation or DEFAULT_AGGREGATION.get(loss_type, "seq_mean_token_mean")
