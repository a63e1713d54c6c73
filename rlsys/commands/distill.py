"""`rlsys distill CONFIG`: distillation. The config is checked before Ray is imported."""

from __future__ import annotations

import argparse

from rlsys.commands.grpo import checked, watches
from rlsys.commands.grpo_restarts import run_attempts
from rlsys.config import DistillConfig
from rlsys.preflight.distill import check_distill_run


def main(args: argparse.Namespace) -> int | None:
    """Train with `args.config` and `args.overrides`; returns the exit code of the last attempt."""
    resolved = checked(DistillConfig, check_distill_run, args.config, args.overrides)
    if watches(resolved.config):
        return run_attempts(resolved.config, args.config, args.overrides)
    from rlsys.launch import run_distill

    run_distill(resolved)
    return None
