"""Runs as a user starts them: each file has runs, and Ray clusters, of its own."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "actors")]  # its runs and processes

from run_cases import starter_model  # noqa: E402, F401  # a fixture
