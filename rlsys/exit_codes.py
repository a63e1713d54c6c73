"""How a command ended, as its exit code: what schedulers, scripts and `--max_restarts` go by."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from rlsys.interrupts import PREEMPTION_SIGNALS, Stopped
from rlsys.problems import RunFailed, TrainingStopped

DONE = 0
FAILED = 1
"""The run failed, or a check found problems."""
WRONG_INPUT = 2
UNHEALTHY = 3
"""Its own metrics ended the run: `tracking.stop_on`, or steps that train nothing."""
DISK_FULL = 74
"""EX_IOERR of sysexits.h: it can go on once the user has made room."""
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: the machine is being taken away; go on elsewhere."""
INTERRUPTED = 130
"""128 + SIGINT."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or a user's share of it, without room."""
FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
"""How they read in the message of another process."""


def of_signal(number: int) -> int:
    """Of a command that a signal stopped: 128 + its number, as shells have it, or PREEMPTED."""
    return PREEMPTED if number in PREEMPTION_SIGNALS else 128 + number


def of_error(error: BaseException) -> int:
    """Of a command that ended with this error."""
    if isinstance(error, KeyboardInterrupt):
        return of_signal(error.number) if isinstance(error, Stopped) else INTERRUPTED
    if is_full_disk(error):
        return DISK_FULL
    if isinstance(error, TrainingStopped):
        return UNHEALTHY
    return WRONG_INPUT if is_users_mistake(error) else FAILED


def is_users_mistake(error: BaseException) -> bool:
    """Whether it is a ValueError of this package, which is about the user's input.

    One that a library raises deep in a run is a bug, and its traceback is needed.
    """
    if not isinstance(error, ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def is_full_disk(error: BaseException) -> bool:
    """Whether a full disk is why this process, or an actor of the run, failed."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return isinstance(error, RunFailed) and any(text in reason(error) for text in FULL_TEXTS)


def reason(error: BaseException) -> str:
    """The last line of an error's message, which says who failed at what."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
