"""`rlsys preference CONFIG`: preference training. Checks the config before Ray is imported."""

from __future__ import annotations

import argparse

from rlsys.commands.grpo import checked, watches
from rlsys.commands.grpo_restarts import run_attempts
from rlsys.config import PreferenceConfig
from rlsys.preflight.preference import check_preference_run


def main(args: argparse.Namespace) -> int | None:
    """Train with `args.config` and `args.overrides`; returns the exit code of the last attempt."""
    resolved = checked(PreferenceConfig, check_preference_run, args.config, args.overrides)
    if watches(resolved.config):
        return run_attempts(resolved.config, args.config, args.overrides)
    from rlsys.launch import run_preference

    run_preference(resolved)
    return None
