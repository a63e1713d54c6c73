"""Which attempt of a run this process is: `max_restarts` starts a driver several times."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

NUMBER = "RLSYS_ATTEMPT"
"""Environment variable of a driver that is watched: 1, 2, ..."""
CONTINUES = "RLSYS_CONTINUES"
"""Set for a driver that continues what an attempt before it began."""
_PR_SET_PDEATHSIG = 1


def attempt() -> int | None:
    """The number of this attempt; None where nobody would start another one."""
    number = os.environ.get(NUMBER)
    return None if number is None else int(number)


def is_restarted() -> bool:
    """Whether an attempt before this one failed, so that nodes may be missing for a while."""
    return (attempt() or 1) > 1


def continues() -> bool:
    """Whether this process goes on from the newest checkpoint of the attempt before."""
    return CONTINUES in os.environ


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to a driver that is watched when its parent is killed."""
    if attempt() is not None and Path("/proc/self").exists():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
