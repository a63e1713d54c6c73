"""The helper process of `BoundedCalls`: when it starts and how it ends."""

import subprocess
import sys

import pytest

from rlsys.rewards.bounded import BoundedCalls

KILLED_WHILE_IT_WAITS = """
import os, signal, threading, time
from rlsys.rewards.bounded import BoundedCalls

calls = BoundedCalls("time:sleep", cpu_limit_s=5.0)
threading.Thread(target=calls, args=(1.0,), daemon=True).start()
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_imports_are_done_in_the_constructor(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
        "def double(x):\n    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    calls = BoundedCalls("slow_to_import:double", cpu_limit_s=5.0)
    assert (tmp_path / "imported").exists()
    assert calls(4) == 8


def test_what_cannot_be_imported_is_an_error_of_the_constructor():
    with pytest.raises(
        RuntimeError, match=r"helper process of no\.such:function ended with code 1"
    ):
        BoundedCalls("no.such:function", cpu_limit_s=5.0)


def test_the_helper_of_a_killed_process_ends_without_a_word():
    command = [sys.executable, "-c", KILLED_WHILE_IT_WAITS]
    # It has the same stderr, so this waits for the helper too.
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -9
    assert ended.stderr == ""
