"""A run to track, shared by the tests of the trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsys.config import Config
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup


def make_config(output_dir: Path, report_to: list[str] | None = None, **fields: Any) -> Config:
    return Config.model_validate(
        {
            "output_dir": str(output_dir),
            "max_steps": 60,
            "data": {"dataset": ["train.jsonl"]},
            "model": {"path": "model"},
            "rollout": {"generation_batch_size": 4, "num_generations": 2},
            "reward": {"reward_funcs": ["countdown", "format"]},
            "tracking": {"report_to": report_to or []},
            **fields,
        }
    )


def make_group(
    texts: list[str],
    rewards: list[float] | None = None,
    *,
    group_id: int = 0,
    question: str = "Make 25 from 5, 7 and 2.",
) -> RolloutGroup:
    return RolloutGroup(
        ticket=group_id,
        group_id=group_id,
        prompt=Prompt(
            prompt_id=f"countdown-{group_id}",
            messages=[
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": question},
            ],
            token_ids=[1, 2],
        ),
        completions=[
            Completion(
                token_ids=list(range(len(text))),
                rollout_logprobs=[-0.5] * len(text),
                text=text,
                finish_reason="stop",
                policy_versions=(3,),
            )
            for text in texts
        ],
        rewards=[RewardOutput(total, {"countdown": total}) for total in rewards or []],
    )


DRIVER_METRICS: dict[str, float] = {
    "loss": -0.0012,
    "grad_norm": 0.7,
    "learning_rate": 5e-7,
    "reward": 1.367,
    "reward_std": 0.307,
    "frac_reward_zero_std": 0.703,
    "rewards/countdown/mean": 0.684,
    "rewards/countdown/std": 0.31,
    "completions/mean_length": 667.0,
    "completions/min_length": 193.0,
    "completions/max_length": 1024.0,
    "completions/clipped_ratio": 0.316,
    "kl": 0.0215,
    "clip_ratio/low_mean": 0.0,
    "clip_ratio/low_min": 0.0,
    "clip_ratio/high_mean": 0.0,
    "clip_ratio/high_max": 0.0,
    "clip_ratio/region_mean": 0.0,
    "epoch": 0.12,
    "memory(GiB)": 71.5,
    "sampling/logp_difference/mean": 0.0021,
    "sampling/logp_difference/max": 0.4,
    "sampling/kl": 0.0002,
    "rollout/tokens_per_second": 1175.0,
    "time/rollout": 200.0,
    "time/policy_update": 80.0,
    "time/step": 290.0,
    "policy_version": 30,
}
"""What the driver knows of a step."""

LOG_LINE_KEYS = [
    "loss",
    "grad_norm",
    "learning_rate",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/countdown/mean",
    "rewards/countdown/std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "epoch",
    "global_step/max_steps",
    "percentage",
    "elapsed_time",
    "remaining_time",
    "memory(GiB)",
    "train_speed(iter/s)",
]
"""The log line that ms-swift's users know."""
