"""The helper process of `BoundedCalls`: when it starts and how it ends."""

import os
import signal
import subprocess
import sys

import pytest

from rlsys.sandbox import bounded
from rlsys.sandbox.bounded import BoundedCalls, start_helpers

KILLED_WHILE_IT_WAITS = """
import os, signal, threading, time
from rlsys.sandbox import bounded
from rlsys.sandbox.bounded import BoundedCalls

calls = BoundedCalls("time:sleep", cpu_limit_s=5.0)
threading.Thread(target=calls, args=(1.0,), daemon=True).start()
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def slow_to_import(tmp_path, monkeypatch):
    """A module that leaves a file for each process that imports it."""
    (tmp_path / "slow_to_import.py").write_text(
        "import os\nfrom pathlib import Path\n"
        "Path(__file__).with_name(f'by{os.getpid()}').touch()\n"
        "def double(x):\n    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return lambda: len(list(tmp_path.glob("by*")))


def test_the_imports_are_done_before_the_first_call(slow_to_import):
    calls = [BoundedCalls("slow_to_import:double", cpu_limit_s=5.0) for _ in range(2)]
    assert slow_to_import() == 0
    start_helpers()
    start_helpers()
    assert slow_to_import() == 2
    assert [call(4) for call in calls] == [8, 8]
    assert slow_to_import() == 2


def test_a_call_starts_its_helper_if_necessary(slow_to_import):
    assert BoundedCalls("slow_to_import:double", cpu_limit_s=5.0)(4) == 8
    assert slow_to_import() == 1


def test_a_failed_import_is_an_error_of_the_start_and_of_every_call():
    calls = BoundedCalls("no.such:function", cpu_limit_s=5.0)
    message = r"helper process of no\.such:function ended with code 1"
    others = [BoundedCalls("math:sqrt", cpu_limit_s=5.0) for _ in range(2)]
    for start in (start_helpers, calls, calls):
        with pytest.raises(RuntimeError, match=message):
            start()
    assert [other(4) for other in others] == [2.0, 2.0]


def test_the_helper_of_a_killed_process_ends_without_a_word():
    command = [sys.executable, "-c", KILLED_WHILE_IT_WAITS]
    # It has the same stderr, so this waits for the helper too.
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -9
    assert ended.stderr == ""


def test_a_helper_that_is_stopped_is_an_error_and_the_next_call_works(monkeypatch):
    calls = BoundedCalls("math:sqrt", cpu_limit_s=5.0)
    assert calls(9) == 3.0
    stopped = calls._process
    os.kill(stopped.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
    with monkeypatch.context() as patch:
        patch.setattr(bounded, "_WALL_S", 0.2)
        patch.setattr(bounded, "_WALL_PER_CPU", 0.0)
        with pytest.raises(RuntimeError, match=r"math:sqrt did not answer within 0\.2 s.*SIGSTOP"):
            calls(16)
    assert stopped.returncode == -9
    assert calls(16) == 4.0


def test_requests_larger_than_a_pipe_arrive_whole():
    calls = BoundedCalls("builtins:len", cpu_limit_s=5.0)
    for size in (10, 65_536, 3_000_000):
        assert calls("x" * size) == size
    echo = BoundedCalls("builtins:str", cpu_limit_s=5.0)
    assert echo("y" * 1_000_000) == "y" * 1_000_000
