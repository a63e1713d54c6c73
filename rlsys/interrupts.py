"""Ctrl-C, SIGTERM, a closed terminal, and notices that the machine will be taken away.

They interrupt a run between two steps; the second one ends it at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PREEMPTION_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm's `--signal` and other schedulers send before they take a machine away."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *PREEMPTION_SIGNALS)
"""Ctrl-C; `ray job stop`, `kill` and job schedulers; a closed terminal; notices of preemption."""
SAME_S = 1.0
"""Signals this soon after the first one count as the same: `timeout` sends two."""
LOOK_EVERY_S = 1.0
"""Seconds between two looks for the file of a preemption notice."""
RAY_JOB_STOP_S = 3.0
"""What `ray job stop` gives a job unless RAY_JOB_STOP_WAIT_TIME_S says more."""
CLOSING_SHARE, CLOSING_S = 0.25, 10.0
"""The end of the given time that is for closing files and actors: a quarter, 10 s at most."""


class Stopped(KeyboardInterrupt):
    """A stop signal: end after what has to be finished, and save."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        if self.number == signal.SIGINT:
            return "interrupted"
        what = "preempted" if self.number in PREEMPTION_SIGNALS else "interrupted"
        return f"{what} by {signal.Signals(self.number).name}"


class ImpatientInterrupt(Stopped):
    """The second Ctrl-C, or the end of the given time: end at once, save nothing."""


class _Signals:
    """The stop signals that this process got so far."""

    def __init__(self, exit_timeout_s: float | None) -> None:
        self.exit_timeout_s = exit_timeout_s
        self.first: int | None = None
        self.first_at = 0.0
        self.given_s: float | None = None
        """Seconds from `first_at` until this process has to have ended."""
        self.first_finishes: str | None = None
        """What has to be finished before a signal that is held back interrupts."""
        self.is_pending = False
        self.is_impatient = False
        """Whether ImpatientInterrupt was raised."""


_signals = _Signals(None)


@contextmanager
def interruptible(
    on_first: Callable[[], None] | None = None,
    *,
    exit_timeout_s: float | None = None,
    preemption_file: Path | None = None,
) -> Iterator[None]:
    """Let stop signals raise Stopped in the main thread, and ImpatientInterrupt the second time.

    Args:
        on_first: called at once, in the handler of the first signal: `ray job stop` kills after
            three seconds, and the run may still be saving by then.
        exit_timeout_s: seconds after the first signal at which ImpatientInterrupt is raised, less
            where the caller gives less, see `seconds_given`; None sets no limit.
        preemption_file: its appearance counts as SIGUSR1.
    """
    global _signals
    noticed_s: list[float | None] = []  # what the file of the notice says

    def interrupt(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if _signals.first is not None:
            if now - _signals.first_at < SAME_S:
                return
            _signals.is_impatient = True
            raise ImpatientInterrupt(number)
        _signals.first, _signals.first_at = number, now
        _signals.given_s = seconds_given(number, exit_timeout_s, *noticed_s)
        if _signals.given_s is not None:
            signal.setitimer(signal.ITIMER_REAL, max(_signals.given_s, SAME_S))
        if on_first is not None:
            with suppress(OSError):  # a full disk must not keep the run going
                on_first()
        if _signals.first_finishes is None:
            raise Stopped(number)
        _signals.is_pending = True
        text = f"\n{Stopped(number)}: {_signals.first_finishes} first. Ctrl-C again ends at once.\n"
        with suppress(OSError):  # a closed terminal; not print, which may be in the middle of one
            os.write(2, text.encode())

    outer, _signals = _signals, _Signals(exit_timeout_s)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        # nohup has SIGHUP ignored; a notice that the machine goes away concerns every run.
        if handler != signal.SIG_IGN or number in PREEMPTION_SIGNALS:
            signal.signal(number, interrupt)
    at_alarm = signal.signal(signal.SIGALRM, _out_of_time)
    over = threading.Event()
    if preemption_file is not None:
        _start_looking(preemption_file, noticed_s, over)
    try:
        yield
    except KeyboardInterrupt as error:
        raise as_stopped(error) from None
    finally:
        over.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, at_alarm)
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals = outer


def _out_of_time(number: int, frame: FrameType | None) -> None:
    assert _signals.first is not None
    with suppress(OSError):
        os.write(2, f"\nnot ended within {_signals.given_s:g} s: ending now\n".encode())
    _signals.is_impatient = True
    raise ImpatientInterrupt(_signals.first)


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
        assert _signals.first is not None
        raise Stopped(_signals.first)


def as_stopped(error: BaseException) -> BaseException:
    """The Stopped that a handler raised: Ray raises a plain KeyboardInterrupt in its place."""
    is_plain = isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped)
    if not is_plain or _signals.first is None:
        return error
    return ImpatientInterrupt(_signals.first) if is_impatient() else Stopped(_signals.first)


def is_impatient() -> bool:
    """Whether this process has to end at once: a second signal, or no time left."""
    return _signals.is_impatient


def seconds_to_save(otherwise_s: float) -> float:
    """Seconds that are left for saving: what was given at the first signal, without what closing
    files and actors takes; `otherwise_s` if no signal came, since the run failed."""
    if _signals.first is None or _signals.given_s is None:
        return otherwise_s
    closing_s = min(CLOSING_S, CLOSING_SHARE * _signals.given_s)
    return max(0.0, _signals.first_at + _signals.given_s - closing_s - time.monotonic())


def seconds_given(
    number: int, exit_timeout_s: float | None, notice_s: float | None = None
) -> float | None:
    """Seconds from a stop signal until this process is killed, as far as that is known.

    Args:
        number: the signal.
        exit_timeout_s: the run's own limit; None is without a limit.
        notice_s: what the file of a preemption notice says.
    """
    limits = [exit_timeout_s, notice_s]
    if number == signal.SIGTERM and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # a Ray job
        try:
            limits.append(float(os.environ["RAY_JOB_STOP_WAIT_TIME_S"]))
        except (KeyError, ValueError):
            limits.append(RAY_JOB_STOP_S)
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _start_looking(file: Path, noticed_s: list[float | None], over: threading.Event) -> None:
    args = (file, noticed_s, over)
    threading.Thread(target=_look_for_notice, args=args, daemon=True).start()


def _look_for_notice(file: Path, noticed_s: list[float | None], over: threading.Event) -> None:
    """Send SIGUSR1 to this process when the file appears; its text may be a number of seconds."""
    while not over.wait(LOOK_EVERY_S):
        try:
            text = file.read_text()
        except FileNotFoundError:
            continue
        except OSError:
            text = ""
        try:
            noticed_s[:] = [float(text)]
        except ValueError:
            noticed_s[:] = [None]
        if _signals.first is None:  # while Ray starts, the signal is ignored: send it again
            os.kill(os.getpid(), signal.SIGUSR1)
