"""The guard of a process: it outlives the process, and removes what that left behind.

Libraries leave named semaphores, shared memory and files in the temporary folder if a process is
killed before it removes them, and processes of its own. The guard runs as a script without
site-packages, holds about 10 MiB, and is a child of nobody: Ray kills the children of a worker.
Linux only; elsewhere nothing is guarded.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":  # -I leaves out the folder that has rlsys
    sys.path.append(str(Path(__file__).parents[1]))
from rlsys.processes import SharedNames, descendants, started_at

LOOK_EVERY_S = 0.5
LONGEST_PAUSE_S = 4.0
"""Most seconds between two walks through the processes, once these no longer change: a walk reads a
file for each thread, which took 2% of a core."""
START_S = 60.0
GRACE_S = 5.0
"""Seconds that processes have to end by themselves once their guarded process is gone."""


class Guard:
    """The process that is guarded, as it talks to its guard."""

    def __init__(self) -> None:
        """Start the guard, which watches this process."""
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
        # Two steps, so that the guard is not a child of this process; `wait` reads its stdout.
        starter = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert starter.stdin is not None
        assert starter.stdout is not None
        self._to, self._from = starter.stdin, starter.stdout
        starter.wait(START_S)

    def watch(self, pids: Sequence[int]) -> None:
        """Guard these processes and their children, too."""
        self._tell(watch=list(pids))

    def remove(self, folder: Path) -> None:
        """Remove a folder at the end."""
        self._tell(remove=str(folder))

    def spare(self, folder: Path) -> None:
        """Do not remove a folder after all."""
        self._tell(spare=str(folder))

    def keep(self, folder: Path, target: Path | None) -> None:
        """Move a folder to `target` first, beside what is there; None no longer moves it."""
        self._tell(keep=str(folder), target=None if target is None else str(target))

    def close(self) -> None:
        """Have everything removed now, and wait for that; a guard that is gone is no error."""
        self._tell(closes=True)
        with contextlib.suppress(OSError):
            self._to.close()
        select.select([self._from], [], [], 4 * GRACE_S)
        self._from.close()

    def _tell(self, **message: object) -> None:
        """Send a message, and wait until the guard has looked around since."""
        with contextlib.suppress(OSError):
            self._to.write(json.dumps(message).encode() + b"\n")
            self._to.flush()
            if select.select([self._from], [], [], GRACE_S)[0]:
                os.read(self._from.fileno(), 1)


def guard() -> Guard | None:
    """A guard of this process; None on systems without /proc."""
    return Guard() if Path("/proc/self/maps").exists() else None


def guard_actor() -> None:
    """Guard this process, an actor, and give it a temporary folder of its own.

    Called before libraries ask for the temporary folder: vLLM's files and sockets go there.
    """
    kept = None if _of_actor else guard()
    if kept is None:
        return
    # torch's compiled kernels are worth keeping. This is where torch itself puts them.
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        shared = Path(tempfile.gettempdir()) / f"torchinductor_{user}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(shared))
    folder = tempfile.mkdtemp(prefix="rlsys-")
    kept.remove(Path(folder))
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    _of_actor.append(kept)


_of_actor: list[Guard] = []
"""Holds the pipe to the guard open for as long as the process lives."""


# --- the guard itself ----------------------------------------------------------------------------


def main(pid: int) -> None:
    """Watch process `pid` until it ends or closes the pipe, then remove what is left."""
    if os.fork():
        os._exit(0)
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    left = _Left(pid)
    buffer = b""
    while left.is_alive(pid):
        readable, _, _ = select.select([0], [], [], LOOK_EVERY_S)
        if readable:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                left.note(json.loads(line))
                left.look(at_once=True)
                os.write(1, b".")
        left.look()
    left.look(at_once=True)
    left.remove()


class _Left:
    """What a process and its children may leave."""

    def __init__(self, pid: int):
        self._roots = {pid}
        self._own = pid
        self._started: dict[int, str] = {}
        """Process -> when it started: a process id may be used again."""
        self._names = SharedNames()
        self._folders: list[str] = []
        self._kept: dict[str, str] = {}
        self._closes = False
        """Whether the guarded process goes on, after it has ended the others itself."""
        self._walk_at, self._pause_s = 0.0, LOOK_EVERY_S
        self._remember([pid])

    def note(self, message: dict[str, object]) -> None:
        """Take a message of `Guard`."""
        if isinstance(pids := message.get("watch"), list):
            self._roots.update(pids)
        self._closes = "closes" in message
        if isinstance(folder := message.get("remove"), str):
            self._folders.append(folder)
        if message.get("spare") in self._folders:
            self._folders.remove(str(message["spare"]))
        if isinstance(folder := message.get("keep"), str):
            self._kept.pop(folder, None)
            if isinstance(target := message.get("target"), str):
                self._kept[folder] = target

    def look(self, *, at_once: bool = False) -> None:
        """Note the processes that there are, unless that was just done, and the names in /dev/shm
        that they map."""
        if at_once or time.monotonic() >= self._walk_at:
            self._walk()
        self._names.look(self._walk)

    def _walk(self) -> Iterable[int]:
        known = len(self._started)
        self._remember([pid for root in self._roots for pid in descendants(root)])
        is_new = len(self._started) > known
        self._pause_s = LOOK_EVERY_S if is_new else min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._walk_at = time.monotonic() + self._pause_s
        return self._started

    def is_alive(self, pid: int) -> bool:
        """Whether a process that was seen still runs."""
        return self._started.get(pid) == started_at(pid) is not None

    def remove(self) -> None:
        """Wait for the processes, kill those that do not end, and remove names and folders."""
        deadline = time.monotonic() + GRACE_S
        spared = self._spared() if self._closes else set()
        others = [pid for pid in self._started if pid not in spared]
        while any(map(self.is_alive, others)):
            self.look()
            if time.monotonic() > deadline:
                for pid in filter(self.is_alive, others):
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
            if time.monotonic() > deadline + GRACE_S:
                break  # in uninterruptible sleep
        self._names.remove()
        for folder, target in self._kept.items():
            with contextlib.suppress(OSError):
                shutil.copytree(folder, target, dirs_exist_ok=True)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _spared(self) -> set[int]:
        """The guarded process and its children, but not those of the other roots."""
        spared = {self._own, *descendants(self._own)}
        others = self._roots - {self._own}
        return spared - {pid for root in others for pid in (root, *descendants(root))}

    def _remember(self, pids: Sequence[int]) -> None:
        for pid in pids:
            start = None if pid in self._started else started_at(pid)
            if start is not None:
                self._started[pid] = start


if __name__ == "__main__":
    main(int(sys.argv[1]))
