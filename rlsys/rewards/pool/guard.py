"""The guard of a reward process: a process that watches its memory and its parent.

It outlives the process, and removes the semaphores and the shared memory that this left. It is not
a thread, because code that never releases the interpreter stops all threads. It runs as a script
without site-packages.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # -I leaves out the folder that has rlsys
    sys.path.append(str(Path(__file__).parents[3]))
from rlsys.processes import SharedNames, descendants, parent_of

MEMORY_SHARE = 0.25
"""Share of the machine's memory that a process may hold if no limit is set."""
_POLL_S = 0.05
_CHILDREN_EVERY = 5
"""Polls between two looks at the children: finding them costs about 0.1 ms."""
_GRACE_S = 5.0
"""Seconds that killed processes have until names that they left in /dev/shm are removed."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


def start_guard(max_memory_mb: int | None) -> subprocess.Popen[bytes] | None:
    """Kill this process and all that it started when they hold too much memory.

    The guard also kills them when this process ends, and when its parent ends, which would have
    killed it. This process leads a process group, which dies as one. Linux only.

    A limit of the address space would not do: torch and others reserve far more than they use. The
    kernel's own killer might take the driver.

    Args:
        max_memory_mb: MiB that they may hold together; None is `MEMORY_SHARE` of the machine's.
    """
    if not Path("/proc/self/statm").exists():
        return None
    limit = (max_memory_mb or 0) << 20
    if max_memory_mb is None:
        machine = os.sysconf("SC_PHYS_PAGES") * _PAGE
        limit = int(machine * MEMORY_SHARE)
    assert os.getpgrp() == os.getpid(), "the guard kills the whole group"
    numbers = [str(number) for number in (os.getpid(), os.getppid(), limit)]
    # -I: modules beside this file must not shadow Python's own.
    command = [sys.executable, "-I", "-S", __file__, *numbers]
    # In a session of its own, as it must outlive the group.
    return subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)


def memory_of(pids: list[int], limit: int) -> int:
    """Bytes that processes hold together.

    Shared pages count once where the quick sum, which counts them for each, is over `limit`.
    """
    quick = sum(_resident(pid) for pid in pids)
    return quick if quick <= limit or len(pids) == 1 else sum(_proportional(pid) for pid in pids)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0  # it ended


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def _watch(pid: int, parent: int, limit: int, names: SharedNames) -> None:
    """Return when the process has to be killed, or has ended."""
    polls = 0
    while os.getppid() == pid and parent_of(pid) == parent:
        names.look(partial(descendants, pid))
        size = memory_of(descendants(pid) if polls % _CHILDREN_EVERY == 0 else [pid], limit)
        if size > limit:
            print(
                f"reward process {pid} was killed: with its children it holds {size >> 20} MiB, "
                f"more than reward.max_memory_mb = {limit >> 20}",
                file=sys.stderr,
                flush=True,
            )
            return
        polls += 1
        time.sleep(_POLL_S)


if __name__ == "__main__":
    watched, its_parent, most = map(int, sys.argv[1:])
    shared_names = SharedNames()
    _watch(watched, its_parent, most, shared_names)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(watched, signal.SIGKILL)
    shared_names.remove(_GRACE_S)
