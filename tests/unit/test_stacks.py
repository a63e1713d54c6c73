"""The stacks of a process that does not answer, whatever it does instead."""

import os
import signal
import subprocess
import sys

import pytest
from waiting import eventually

from rlsys import stacks
from rlsys.processes import state_of
from rlsys.stacks import read_stacks

pytestmark = pytest.mark.processes

PROGRAM = """
import subprocess, sys, threading, time
from rlsys.stacks import answer_for_stacks

answer_for_stacks()
lock = threading.Lock()

def waits_for_a_lock():
    with lock:
        lock.acquire()

def computes_in_c():
    9 ** 9 ** 9

def sleeps():
    time.sleep(999)

def waits_for_a_child():
    child = [sys.executable, "-c", sys.argv[2], "sleeps"]
    subprocess.run(child)

threading.Thread(target=waits_for_a_lock, daemon=True).start()
print("started", flush=True)
globals()[sys.argv[1]]()
"""


@pytest.fixture
def start():
    """Starts PROGRAM, or another one, and waits until it has started."""
    processes = []

    def start(does, program=PROGRAM):
        command = [sys.executable, "-c", program, does, PROGRAM]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True))
        assert processes[-1].stdout.readline() == b"started\n"
        return processes[-1]

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("does", ["sleeps", "computes_in_c"])
def test_all_threads_are_shown_and_the_process_goes_on(start, does):
    process = start(does)
    for _ in range(2):
        found = eventually(lambda: does in (s := read_stacks(process.pid)).text and s, does)
        assert found.problem == ""
        assert "in waits_for_a_lock" in found.text
        assert f"in {does}" in found.text
        assert found.text.count(f"in {does}") == 1
    assert process.poll() is None


def test_children_are_shown_too(start):
    process = start("waits_for_a_child")

    def stacks_of_both():
        text = read_stacks(process.pid).text
        return text if "in sleeps" in text and "in waits_for_a_child" in text else None

    assert eventually(stacks_of_both, "parent and child").count("process ") == 2


@pytest.mark.parametrize("has_py_spy", [True, False])
def test_a_stopped_process_cannot_write_and_is_said_to_be_stopped(start, monkeypatch, has_py_spy):
    process = start("sleeps")
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: state_of(process.pid) == "T", "the process stops")
    if not has_py_spy:
        monkeypatch.setattr(stacks, "_py_spy", lambda pid: "")
    found = read_stacks(process.pid)
    assert found.problem == ("is stopped (SIGSTOP, or a debugger), so it cannot write its stacks")
    # py-spy may lack the right to look into other processes.
    assert "sleeps" in found.text or found.text == ""
    assert has_py_spy or found.text == ""
    process.send_signal(signal.SIGCONT)
    eventually(lambda: read_stacks(process.pid).problem == "", "it answers again")


def test_a_process_that_never_agreed_is_not_killed_by_the_question(start):
    process = start("", "import time\nprint('started', flush=True)\ntime.sleep(999)")
    assert read_stacks(process.pid).problem == "has not come to writing stacks yet"
    assert process.poll() is None


def test_a_process_that_is_gone():
    process = subprocess.Popen(["true"])
    process.wait()
    assert read_stacks(process.pid) == stacks.Stacks("", "has ended")
