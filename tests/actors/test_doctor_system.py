"""`rlsys doctor` for real: it imports everything and starts Ray."""

import subprocess
import sys

import pytest
from run_cases import write_run_files


@pytest.mark.system
def test_the_environment_of_the_tests_can_run():
    command = [sys.executable, "-m", "rlsys.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ran a task" in done.stdout


@pytest.mark.system
@pytest.mark.slow
def test_the_canary_finds_nothing_in_a_healthy_system(tmp_path, starter_model):
    write_run_files(tmp_path, starter_model)
    command = [sys.executable, "-m", "rlsys.cli", "doctor", "--canary", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok ") == 5
    assert not (tmp_path / "out").exists()
