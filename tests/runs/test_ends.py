"""However a run ends, it ends with its exit code, and leaves nothing outside of its folder.

Each run has a mount namespace of its own, with an empty /tmp and /dev/shm: what is in them later,
and whatever process is in the namespace, is the run's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from run_cases import RunProcess, is_alive, title, write_run_files
from two_nodes import can_hide_folders
from waiting import eventually

from rlsys.run.folder import RunDir

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.skipif(not can_hide_folders(), reason="no user namespaces"),
]

HOLDER = """
import subprocess, sys

def mount(*words):
    subprocess.run(["mount", *words], check=True)

mount("--bind", sys.argv[1], "/mnt")
for target in ("/tmp", "/dev/shm"):
    mount("-t", "tmpfs", "none", target)
for size in sys.argv[2:]:
    mount("-t", "tmpfs", "-o", f"size={size}", "none", "/mnt/out")
print("ready", flush=True)
sys.stdin.read()
"""
WORDS = (
    *("--max_steps", "2", "--grpo.beta", "0", "--eval_steps", "null"),
    *("--checkpoint.save_steps", "1", "--checkpoint.save_hf_steps", "null"),
)
IN_STEP_2 = 4 + 1
"""Groups that are scored by then."""


class Place:
    """A mount namespace: `folder` is /mnt there."""

    def __init__(self, folder: Path, *sizes: str):
        self._folder = folder
        (folder / "out").mkdir()
        self._holder = subprocess.Popen(
            ["unshare", "-rm", sys.executable, "-c", HOLDER, str(folder), *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.root = Path(f"/proc/{self._holder.pid}/root")
        self._namespace = os.readlink(f"/proc/{self._holder.pid}/ns/mnt")
        self.enter = (
            *("nsenter", "-t", str(self._holder.pid), "-m", "-U", "--preserve-credentials"),
            *("sh", "-c", 'cd /mnt && exec "$@"', "sh"),
        )

    def processes(self) -> list[psutil.Process]:
        """All that run here, but for the one that holds the place."""
        return [p for p in psutil.process_iter() if p.pid != self._holder.pid and self._is_here(p)]

    def left(self) -> list[str]:
        """Files in /tmp and /dev/shm, and folders of Ray's clusters and rlsys."""
        found = []
        for top in ("tmp", "dev/shm"):
            for path in (self.root / top).rglob("*"):
                if not path.is_dir() or path.parent.name == "ray" or path.match("rlsys-*"):
                    found.append(str(path.relative_to(self.root)))
        return found

    def close(self) -> None:
        for process in self.processes():
            process.kill()
        self._holder.communicate()

    def _is_here(self, process: psutil.Process) -> bool:
        try:
            here = os.readlink(f"/proc/{process.pid}/ns/mnt") == self._namespace
        except OSError:
            return False
        return here and is_alive(process)


def kill(class_name):
    def end(run):
        run.actors(class_name)[0].kill()
        run.release()

    return end


def send(*numbers, group=True):
    """Signals, more than a second apart: those together count as one."""

    def end(run):
        for count, number in enumerate(numbers):
            if count:
                time.sleep(1.2)
            (os.killpg if group else os.kill)(run.popen.pid, number)

    return end


def interrupt_twice(run):
    """The policy does not answer, so the first one would wait until its deadline."""
    run.actors("PolicyRank")[0].suspend()
    send(signal.SIGINT, signal.SIGINT)(run)


def notice(run):
    (run.folder / "notice").write_text("300")


NO_RECOVERY = ("--recovery.max_restarts", "0")
SOON = ("--weight_sync.timeout_s", "5")
"""The policy waits so long for an engine that died."""
TWO_WORKERS = ("--rollout.tensor_parallel_size", "2")
ENDS = {
    "done": (0, lambda run: run.release(), ()),
    "ctrl-c": (130, send(signal.SIGINT), ()),
    "ctrl-c twice": (130, interrupt_twice, ()),
    "terminated": (143, send(signal.SIGTERM, group=False), ()),
    "terminated with its group": (143, send(signal.SIGTERM), ()),
    "hung up": (129, send(signal.SIGHUP), ()),
    "preempted by a signal": (75, send(signal.SIGUSR1), ()),
    "preempted by a file": (75, notice, ("--checkpoint.preemption_file", "notice")),
    "driver killed": (-signal.SIGKILL, send(signal.SIGKILL, group=False), TWO_WORKERS),
    "group killed": (-signal.SIGKILL, send(signal.SIGKILL), ()),
    "policy killed": (1, kill("PolicyRank"), NO_RECOVERY),
    "engine killed": (1, kill("RolloutActor"), (*NO_RECOVERY, *TWO_WORKERS, *SOON)),
}
"""Kind -> exit code, how it comes about while a reward function is held, and options."""


@pytest.fixture
def begin(tmp_path, starter_model):
    """Starts a run in a place of its own."""
    started = []

    def begin(*words, sizes=()):
        shutil.copytree(starter_model, tmp_path / "model")
        write_run_files(tmp_path, Path("model"))
        place = Place(tmp_path, *sizes)
        words = ("run.yaml", *WORDS, *words)
        run = RunProcess(tmp_path, *words, hold_after=IN_STEP_2, prefix=place.enter)
        started.append((run, place))
        return run, place

    yield begin
    for run, place in started:
        run.end()
        place.close()


def nothing_is_left(run, place):
    """No process, so no port either: a port is open as long as a process has it."""
    eventually(
        lambda: not place.processes(), f"all processes end: {list(map(title, place.processes()))}"
    )
    assert place.left() == []


@pytest.mark.parametrize("kind", ENDS)
def test_no_end_leaves_anything_behind(begin, kind):
    code, end, words = ENDS[kind]
    run, place = begin(*words)
    run.wait_until_held()
    end(run)
    assert run.wait() == code, run.log
    nothing_is_left(run, place)
    if code != 1:
        assert "Traceback" not in run.log
    if code >= 0:
        assert run.out.status.read_text() == "ended\n"
        assert run.out.read_end()[0] == code
    if code == 1:
        assert list((run.out.path / "logs/ray").glob("session_*/raylet.out"))


@pytest.mark.parametrize(
    ("code", "end"), [(130, send(signal.SIGINT)), (-signal.SIGKILL, send(signal.SIGKILL))]
)
def test_an_end_while_actors_start_leaves_nothing_behind(begin, code, end):
    run, place = begin()
    run.wait_for(lambda: "starting on cpu" in run.log)
    end(run)
    assert run.wait() == code, run.log
    nothing_is_left(run, place)


def test_a_full_disk_is_an_end_like_others(begin):
    run, place = begin(sizes=["7m"])
    run.wait_until_held()
    run.release()
    assert run.wait() == 74, run.log
    nothing_is_left(run, place)
    assert "Traceback" not in run.log
    assert RunDir(place.root / "mnt/out").state() == "ended"
