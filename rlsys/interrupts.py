"""Ctrl-C, SIGTERM and a closed terminal, heard where a step is whole."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; `ray job stop`, `kill` and job schedulers; a closed terminal."""
SAME_S = 1.0
"""Signals so close to the first one are the same wish: `timeout` sends two, a terminal may too."""


class ImpatientInterrupt(KeyboardInterrupt):
    """The second Ctrl-C: end at once, save nothing."""


class _Hearing:
    """The signals of this process, which has one main thread."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.first_finishes: str | None = None
        """What a signal waits for, while it is held back."""
        self.is_pending = False


_hearing = _Hearing()


@contextmanager
def interruptible(on_first: Callable[[], None] | None = None) -> Iterator[None]:
    """Have the stop signals raise KeyboardInterrupt in the main thread; ImpatientInterrupt the
    second time.

    `on_first` is called at once, in the handler of the first signal. `ray job stop` kills after
    three seconds, and the run may still be saving by then.
    """
    global _hearing

    def interrupt(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if _hearing.first_at is not None:
            if now - _hearing.first_at < SAME_S:
                return
            raise ImpatientInterrupt
        _hearing.first_at = now
        if on_first is not None:
            with suppress(OSError):  # a full disk is no reason to go on
                on_first()
        if _hearing.first_finishes is None:
            raise KeyboardInterrupt
        _hearing.is_pending = True
        text = f"\ninterrupted: {_hearing.first_finishes} first. Ctrl-C again ends at once.\n"
        with suppress(OSError):  # the terminal may have been closed
            os.write(2, text.encode())  # not print: the main thread may be in the middle of one

    outer, _hearing = _hearing, _Hearing()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _hearing = outer


@contextmanager
def held_back(what: str = "this step is finished") -> Iterator[None]:
    """Hear the first signal at the end: what began to change or to save the policy is finished."""
    _hearing.first_finishes = what
    try:
        yield
    finally:
        _hearing.first_finishes = None
    if _hearing.is_pending:
        _hearing.is_pending = False
        raise KeyboardInterrupt
