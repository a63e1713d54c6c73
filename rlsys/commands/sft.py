"""`rlsys sft CONFIG`: supervised training. The config is checked before Ray is imported."""

from __future__ import annotations

import argparse

from rlsys.commands.grpo import checked, watches
from rlsys.commands.grpo_restarts import run_attempts
from rlsys.config import SftConfig
from rlsys.preflight.sft import check_sft_run


def main(args: argparse.Namespace) -> int | None:
    """Train with `args.config` and `args.overrides`; returns the exit code of the last attempt."""
    resolved = checked(SftConfig, check_sft_run, args.config, args.overrides)
    if watches(resolved.config):
        return run_attempts(resolved.config, args.config, args.overrides)
    from rlsys.launch import run_sft

    run_sft(resolved)
    return None
