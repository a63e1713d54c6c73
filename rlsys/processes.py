"""What the kernel says of processes, below /proc; Linux only.

It needs nothing but Python: guards import it that run as scripts without site-packages.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_INODE = re.compile(r" (\d+) +/dev/shm/")
_LOOK_AGAIN_S = 0.1


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on, which is the state; [] if it does not exist.

    The second field is the name, which may hold blanks and brackets.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def state_of(pid: int) -> str:
    """The letter of a process's state; empty if it does not exist."""
    return "".join(stat_of(pid)[:1])


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if it does not exist."""
    stat = stat_of(pid)
    return int(stat[1]) if stat else 0


def started_at(pid: int) -> str | None:
    """When a process started, in the kernel's clock; None if it does not run."""
    stat = stat_of(pid)
    return None if not stat or stat[0] in "ZX" else stat[19]


def descendants(pid: int) -> list[int]:
    """A process and its descendants whose parents live, without the calling process.

    The process alone on a kernel without CONFIG_PROC_CHILDREN.
    """
    members = [pid]
    for member in members:  # the list grows in the loop
        try:
            for thread in os.listdir(f"/proc/{member}/task"):
                children = Path(f"/proc/{member}/task/{thread}/children").read_text().split()
                members += [int(child) for child in children if int(child) != os.getpid()]
        except OSError:
            continue  # it ended
    return members


class SharedNames:
    """Names in /dev/shm that processes have mapped: semaphores and shared memory.

    Who is killed leaves them, and Python's resource tracker removes nothing if it is killed, too.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._listed: set[str] = set()

    def look(self, pids: Callable[[], Iterable[int]]) -> None:
        """Note what processes have mapped now; `pids` is asked if there are new names."""
        listed = set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()
        if listed - self._listed:  # reading the maps of a large process takes milliseconds
            for pid in pids():
                self._names |= mapped_names(pid)
        self._listed = listed

    def remove(self, grace_s: float = 0.0) -> None:
        """Remove those that no process maps, or none maps any more after `grace_s` seconds."""
        deadline = time.monotonic() + grace_s
        while self._names:
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
            in_use = {name for pid in pids for name in mapped_names(pid)}
            for name in self._names - in_use:
                with contextlib.suppress(OSError):
                    os.unlink(name)
            self._names &= in_use
            if time.monotonic() >= deadline:
                return
            time.sleep(_LOOK_AGAIN_S)


def mapped_names(pid: int) -> set[str]:
    """Files of /dev/shm that a process has mapped and that still have a name.

    They are found by inode: the C library makes a semaphore under another name, which is what the
    maps show.
    """
    try:
        inodes = set(map(int, _INODE.findall(Path(f"/proc/{pid}/maps").read_text())))
        return {file.path for file in os.scandir(SHARED_MEMORY) if file.inode() in inodes}
    except OSError:
        return set()
