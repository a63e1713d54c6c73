"""`rlsys reward-model CONFIG`: a score head on a language model; as `sft`."""

from __future__ import annotations

import argparse

from rlsys.commands.grpo import checked, watches
from rlsys.commands.grpo_restarts import run_attempts
from rlsys.config import RewardModelConfig
from rlsys.preflight.reward_model import check_reward_model_run


def main(args: argparse.Namespace) -> int | None:
    """Train with `args.config` and `args.overrides`; returns the exit code of the last attempt."""
    resolved = checked(RewardModelConfig, check_reward_model_run, args.config, args.overrides)
    if watches(resolved.config):
        return run_attempts(resolved.config, args.config, args.overrides)
    from rlsys.launch import run_reward_model

    run_reward_model(resolved)
    return None
