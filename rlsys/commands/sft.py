"""`rlsys sft CONFIG`: supervised training. The config is checked before Ray is imported."""

from __future__ import annotations

import argparse

from rlsys.commands.grpo import checked
from rlsys.config import SftConfig
from rlsys.preflight.sft import check_sft_run


def main(args: argparse.Namespace) -> None:
    """Train with `args.config` and `args.overrides`."""
    resolved = checked(SftConfig, check_sft_run, args.config, args.overrides)
    from rlsys.launch import run_sft

    run_sft(resolved)
