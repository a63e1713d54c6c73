"""Ctrl-C, SIGTERM and a closed terminal: they interrupt a run between two steps."""

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
"""Signals this soon after the first one count as the same: `timeout` sends two."""


class ImpatientInterrupt(KeyboardInterrupt):
    """The second Ctrl-C: end at once, save nothing."""


class _Signals:
    """The stop signals that this process got so far."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.first_finishes: str | None = None
        """What has to be finished before a signal that is held back interrupts."""
        self.is_pending = False


_signals = _Signals()


@contextmanager
def interruptible(on_first: Callable[[], None] | None = None) -> Iterator[None]:
    """Let stop signals raise KeyboardInterrupt in the main thread, and ImpatientInterrupt the
    second time.

    `on_first` is called at once, in the handler of the first signal. `ray job stop` kills after
    three seconds, and the run may still be saving by then.
    """
    global _signals

    def interrupt(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if _signals.first_at is not None:
            if now - _signals.first_at < SAME_S:
                return
            raise ImpatientInterrupt
        _signals.first_at = now
        if on_first is not None:
            with suppress(OSError):  # a full disk must not keep the run going
                on_first()
        if _signals.first_finishes is None:
            raise KeyboardInterrupt
        _signals.is_pending = True
        text = f"\ninterrupted: {_signals.first_finishes} first. Ctrl-C again ends at once.\n"
        with suppress(OSError):  # the terminal may have been closed
            os.write(2, text.encode())  # not print: the main thread may be in the middle of one

    outer, _signals = _signals, _Signals()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals = outer


@contextmanager
def held_back(what: str = "this step is finished") -> Iterator[None]:
    """Delay the first signal to the end of the body, which changes or saves the policy."""
    _signals.first_finishes = what
    try:
        yield
    finally:
        _signals.first_finishes = None
    if _signals.is_pending:
        _signals.is_pending = False
        raise KeyboardInterrupt
