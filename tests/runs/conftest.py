"""Runs as a user starts them: each file has runs, and Ray clusters, of its own."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "actors")]  # its runs and processes

from run_cases import write_starter  # noqa: E402


@pytest.fixture(scope="session")
def starter_model(tmp_path_factory):
    """The folder of an untrained starter model of examples/countdown, chat template and all."""
    folder = tmp_path_factory.mktemp("models") / "starter"
    write_starter(folder)
    return folder
