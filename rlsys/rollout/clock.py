"""Time as rollouts know it: a clock, waiting for Ray, and work in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlsys.actors.waiting import FETCH_S, PhaseTimeout, any_ready


class Clock:
    """The machine's time. Tests and simulations give rollouts a clock with a time of its own."""

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def wait(self, refs: Sequence[Any], *, timeout_s: float) -> None:
        """Wait until a Ray reference is ready, at most `timeout_s` seconds."""
        any_ready(refs, timeout_s=timeout_s)

    def start(self, work: Callable[[Callable[[], bool]], None]) -> Callable[[], None]:
        """Run `work` in a thread; returns what stops it and waits for its end.

        `work` gets a function that says whether it shall stop. If it does not, there is a
        PhaseTimeout.
        """
        stopped = threading.Event()
        thread = threading.Thread(target=work, args=(stopped.is_set,), daemon=True)
        thread.start()

        def stop() -> None:
            stopped.set()
            thread.join(FETCH_S)
            if thread.is_alive():
                raise PhaseTimeout(f"work in the background did not stop within {FETCH_S:g} s")

        return stop
