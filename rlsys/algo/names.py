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
    "reinforce": "seq_mean_token_sum",
    "sft": "seq_mean_token_mean",
}
"""Of every built-in loss: how its paper averages token losses over an optimizer step."""

WARM_START_LOSSES = ("sft",)
"""Those that look at no reward, which `grpo.loss_type` refuses."""
CLIPPED_LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo", "dual_clip", "gspo", "luspo")
"""Losses with the clipped surrogate, which know `importance_sampling_level` and `delta`."""
SEQUENCE_LOSSES = ("gspo", "luspo")
"""Those of them whose ratio is that of the sequence unless `importance_sampling_level` is set."""

LOSSES_ELSEWHERE = {"ppo": "grpo", "ppo_clip": "grpo", "vanilla": "grpo"}
"""What OpenRLHF and verl call PPO's clipped loss -> its name here."""

DUAL_CLIP_DELTA = 3.0
"""`delta` of dual_clip unless it is set: c of arXiv:1912.09729."""

ADVANTAGE_ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
"""Built-in advantage estimators."""


def aggregation_of(loss_type: str, loss_aggregation: Aggregation | None) -> Aggregation:
    """What the config asks for, else the default of the loss: for a user's own, that of grpo."""
    return loss_aggregation or DEFAULT_AGGREGATION.get(loss_type, "seq_mean_token_mean")
