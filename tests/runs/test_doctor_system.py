"""`rlsys doctor` for real: it imports everything and starts Ray."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
from run_cases import POLL_S, write_run_files


def kill_first_node(root: psutil.Process) -> None:
    """Kill the first process that is a node of Ray's."""
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        for process in root.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet":
                    return process.kill()
        time.sleep(POLL_S)


@pytest.mark.system
def test_the_environment_of_the_tests_can_run(tmp_path):
    """Even if Ray's node dies at first, as on a busy machine; and no token stays in ~/.ray."""
    doctor = subprocess.Popen(
        [sys.executable, "-m", "rlsys.cli", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    killer = threading.Thread(target=kill_first_node, args=[psutil.Process(doctor.pid)])
    killer.start()
    text, _ = doctor.communicate()
    killer.join()
    assert doctor.returncode == 0, text
    assert "Trying again" in text
    assert "ran a task" in text
    assert not (tmp_path / ".ray").exists()


@pytest.mark.system
@pytest.mark.slow
def test_the_canary_finds_nothing_in_a_healthy_system(tmp_path, starter_model):
    write_run_files(tmp_path, starter_model)
    command = [sys.executable, "-m", "rlsys.cli", "doctor", "--canary", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok ") == 5
    assert not (tmp_path / "out").exists()
