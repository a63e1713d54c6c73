"""The console that commands print to."""

from __future__ import annotations

import sys

from rich.console import Console

PIPE_WIDTH = 140
"""Columns of tables that do not go to a terminal."""


def make_console() -> Console:
    """Standard output: as wide as the terminal, or `PIPE_WIDTH`."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
