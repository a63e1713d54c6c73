"""A guard outlives its process, and removes what that and its children left behind."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import eventually

from rlsys import leftovers
from rlsys.processes import started_at

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux only"),
]

PROGRAM = """
import json, multiprocessing, os, signal, subprocess, sys, tempfile
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from rlsys import leftovers

def main():
    how, logs = sys.argv[1:]
    if how == "actor":
        leftovers.guard_actor()
        guard = leftovers._of_actor[0]
    else:
        guard = leftovers.guard()
    folder = Path(tempfile.mkdtemp())
    (folder / "logs").mkdir()
    (folder / "logs" / "log.txt").write_text("why")
    if how != "actor":
        guard.remove(folder)
        guard.keep(folder / "logs", Path(logs))
    lock = multiprocessing.get_context("spawn").Lock()
    shared = SharedMemory(create=True, size=4096)
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    guard.watch([child.pid] if how == "closed" else [])  # returns when the guard has looked
    names = [lock_name(lock), f"/dev/shm/{shared.name}"]
    print(json.dumps({"names": names, "folder": str(folder), "child": child.pid}), flush=True)
    sys.stdin.readline()
    guard.close()
    print(json.dumps([os.path.exists(path) for path in (lock_name(lock), str(folder))]))

def lock_name(lock):
    return f"/dev/shm/sem.{lock._semlock.name[1:]}"

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def start(how):
        (tmp_path / "program.py").write_text(PROGRAM)
        process = subprocess.Popen(
            [sys.executable, "program.py", how, str(tmp_path / "kept")],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        left = json.loads(process.stdout.readline())
        assert all(map(os.path.exists, left["names"]))
        return process, left

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["actor", "driver"])
def test_a_killed_process_leaves_nothing(how, start, tmp_path):
    """Its group is killed, so that Python's own resource tracker cannot remove the names."""
    process, left = start(how)
    os.killpg(process.pid, signal.SIGKILL)
    gone = [*left["names"], left["folder"]]
    eventually(lambda: not any(map(os.path.exists, gone)), f"{gone} are removed")
    eventually(lambda: started_at(left["child"]) is None, "the child is ended")
    assert (tmp_path / "kept" / "log.txt").exists() == (how == "driver")


def test_closing_ends_what_was_watched_and_leaves_the_process_what_it_uses(start):
    process, left = start("closed")
    out, _ = process.communicate("\n")
    assert json.loads(out) == [True, False]  # its own lock, and the folder
    assert started_at(left["child"]) is None


def test_a_guard_looks_less_often_once_the_processes_do_not_change(monkeypatch):
    now, walks, family = [0.0], [], [os.getpid()]

    def walk(pid):
        walks.append(now[0])
        return list(family)

    monkeypatch.setattr(leftovers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(leftovers, "descendants", walk)
    left = leftovers._Left(os.getpid())

    def look_for(seconds):
        walks.clear()
        for _ in range(int(seconds / leftovers.LOOK_EVERY_S)):
            now[0] += leftovers.LOOK_EVERY_S
            left.look()
        return [later - earlier for earlier, later in pairwise(walks)]

    pauses = look_for(60)
    assert pauses == sorted(pauses)
    assert pauses[-1] == leftovers.LONGEST_PAUSE_S
    family.append(os.getppid())
    pauses = look_for(20)
    assert min(pauses) <= 2 * leftovers.LOOK_EVERY_S, "a new process may start others soon"
    assert pauses[-1] == leftovers.LONGEST_PAUSE_S
