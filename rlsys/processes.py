"""What the kernel says of processes, below /proc; Linux only.

It needs nothing but Python: guards import it that run as scripts without site-packages.
"""

from __future__ import annotations

import os
from pathlib import Path


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
