"""Trackers in threads of their own: a slow or dead one does not make a step wait."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlsys.config import RunConfig
from rlsys.timeline.spans import Span
from rlsys.tracking.base import HealthWarning, Metrics, Split, Tracker
from rlsys.tracking.outages import Outages, losses_text, say_line
from rlsys.types import Device, RolloutGroup

MOST_CALLS = 10_000
"""Most steps, and most warnings, that wait for a tracker."""
MOST_TOKENS = 2_000_000
"""Most tokens of completions that wait: a token takes about 70 bytes. Steps have a limit of their
own, so completions cannot take their place."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
"""Before a call that failed is tried again; doubled each time."""
TRIES_OF_ONE = 3
"""A record that failed as often is left out if the one behind it can be written."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that waits for the tracker."""

    method: str
    args: tuple[Any, ...]
    size: int = 1
    """What it takes of the limit of its method: 1, or tokens."""

    def __call__(self, tracker: Tracker) -> None:
        """Make the call."""
        getattr(tracker, self.method)(*self.args)


class BackgroundTracker(Tracker):
    """Calls a tracker in a thread, in order, and tries again what fails.

    The thread makes the tracker, too, since that may ask a server. A tracker that fails twice in a
    row is made again. Calls that find the queue full are lost and counted.

    Args:
        name: of the tracker, for messages.
        make: makes the tracker.
        close_timeout_s: most seconds that `close` waits for what is pending.
        say: prints a line.
        first_pause_s: see FIRST_PAUSE_S.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        *,
        close_timeout_s: float,
        say: Callable[[str], object] = say_line,
        first_pause_s: float = FIRST_PAUSE_S,
    ):
        self.name = name
        self.outages = Outages(f"tracker {name!r}", say)
        self._make, self._say = make, say
        self._close_timeout_s, self._first_pause_s = close_timeout_s, first_pause_s
        self._calls: deque[Call] = deque()
        self._sizes: Counter[str] = Counter()
        """Method -> size of the calls that wait."""
        self._is_full = False
        """Whether calls were lost since the queue was empty."""
        self._changed = threading.Condition()
        self._closed_at: float | None = None
        self._tracker: Tracker | None = None
        self._failures = self._failures_of_first = 0
        """In a row, and those of the first call in the queue."""
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def begin(self, config: RunConfig, device: Device) -> None:
        """Queue it."""
        self._put(Call("begin", (config, device)), MOST_CALLS)

    def log_timeline(self, spans: Sequence[Span]) -> None:
        """Queue them."""
        self._put(Call("log_timeline", (spans,)), MOST_CALLS)

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Queue a copy."""
        self._put(Call("log_metrics", (step, dict(metrics))), MOST_CALLS)

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Queue it."""
        tokens = sum(len(completion.token_ids) for completion in group.completions)
        args = (step, group, advantages, split)
        self._put(Call("log_completions", args, max(1, tokens)), MOST_TOKENS)

    def log_warning(self, step: int, text: str) -> None:
        """Queue it."""
        self._put(Call("log_warning", (step, text)), MOST_CALLS)

    def log_health(self, warning: HealthWarning) -> None:
        """Queue it."""
        self._put(Call("log_health", (warning,)), MOST_CALLS)

    def begin_close(self) -> None:
        """Have the thread end after what is pending; `close` counts its seconds from here."""
        with self._changed:
            if self._closed_at is None:
                self._closed_at = time.monotonic()
            self._changed.notify()

    def close(self) -> None:
        """Wait until everything is written, at most `close_timeout_s` seconds."""
        self.begin_close()
        assert self._closed_at is not None
        waited_s = time.monotonic() - self._closed_at
        self._thread.join(max(0.0, self._close_timeout_s - waited_s))
        if self._thread.is_alive():
            self._say(
                f"note: tracker {self.name!r} has not ended within {self._close_timeout_s:g} s "
                f"(tracking.close_timeout_s); not written: {self._pending() or 'nothing'}"
            )
        self.outages.finish()

    def _put(self, call: Call, limit: int) -> None:
        with self._changed:
            waiting = self._sizes[call.method]
            if waiting == 0 or waiting + call.size <= limit:
                self._calls.append(call)
                self._sizes[call.method] += call.size
                self._changed.notify()
                return
            self.outages.lost[call.method] += 1
            if self._is_full:
                return
            self._is_full = True
        self._say(
            f"note: tracker {self.name!r} is behind, {self._pending()} wait for it. What comes "
            "until it has caught up is lost to it, and counted; the run's own files have it"
        )

    def _pending(self) -> str:
        with self._changed:
            return losses_text(Counter(call.method for call in self._calls))

    # --- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        """Make the tracker, pass on the calls until `begin_close`, and close it."""
        is_last_try = False
        while True:
            try:
                if self._tracker is None:
                    self._tracker = self._make()
                call = self._first_call()
                if call is None:
                    break
                self._pass_on(call, self._tracker)
            except Exception as error:
                self._note_failure(error)
                if is_last_try:
                    break
                is_last_try = self._pause()
        try:
            if self._tracker is not None:
                self._tracker.close()
        except Exception as error:
            self.outages.failed(error, "It was being closed")
        with self._changed:
            self.outages.lost.update(call.method for call in self._calls)
            self._calls.clear()

    def _first_call(self) -> Call | None:
        """The first call, which stays in the queue; None when all are made and it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._closed_at is not None)
            return self._calls[0] if self._calls else None

    def _pass_on(self, call: Call, tracker: Tracker) -> None:
        """Make the first call; leave it out if only it fails, again and again."""
        try:
            call(tracker)
        except Exception:
            self._failures_of_first += 1
            with self._changed:
                behind = self._calls[1] if len(self._calls) > 1 else None
            if behind is None or self._failures_of_first < TRIES_OF_ONE:
                raise
            behind(tracker)
            self._drop_first()
            self.outages.lost[call.method] += 1
        self._drop_first()
        self._failures = self._failures_of_first = 0
        self.outages.worked()
        if self._is_full and not self._calls:
            self._is_full = False
            self._say(f"note: tracker {self.name!r} has caught up")
            self.outages.finish()

    def _drop_first(self) -> None:
        with self._changed:
            call = self._calls.popleft()
            self._sizes[call.method] -= call.size

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        self.outages.failed(error, "The run goes on, and it is tried again")
        if self._failures % 2 == 0 and self._tracker is not None:
            with suppress(Exception):
                self._tracker.close()
            self._tracker = None

    def _pause(self) -> bool:
        """Wait before the next try; returns whether it is the last one, because of `close`."""
        pause_s = min(self._first_pause_s * 2 ** min(self._failures - 1, 20), LONGEST_PAUSE_S)
        with self._changed:
            return self._changed.wait_for(lambda: self._closed_at is not None, pause_s)
