"""`rlsys doctor` for real: it imports everything and starts Ray."""

import subprocess
import sys

import pytest


@pytest.mark.system
def test_the_environment_of_the_tests_can_run():
    command = [sys.executable, "-m", "rlsys.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ran a task" in done.stdout
