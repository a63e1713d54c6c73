"""What each actor did when, on the driver's clock: recorded while the driver works with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from rlsys.timing import PhaseTimer

Role = Literal["driver", "rollout", "reward", "policy", "reference", "teacher"]
DRIVER = "driver"
"""The actor whose lane has the phases of a step."""
MERGE_S = 0.02
"""Pieces of the same work with a shorter gap become one span, whose `busy` leaves the gaps out."""
SHORTEST_S = 1e-4
"""What is shorter is not recorded."""
WRITE_EVERY_S = 5.0
"""Seconds after which finished spans are written although the step goes on."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of time in which an actor did one thing. Spans of an actor do not overlap."""

    actor: str
    """Its name, as errors have it."""
    role: str
    """One of `Role`."""
    phase: str
    """What it did; for rewards the name of the function."""
    start: float
    """Unix seconds."""
    end: float
    """Unix seconds, after `start`."""
    step: int
    """The step that the run was in; no span reaches into two of them."""
    busy: float | None = None
    """Seconds of work, where short gaps are inside; None: all of it."""

    @property
    def seconds(self) -> float:
        """Seconds of work."""
        return self.end - self.start if self.busy is None else self.busy

    def row(self) -> dict[str, Any]:
        """The span as a line of timeline.jsonl has it; microseconds are enough."""
        row = asdict(self)
        for name in ("start", "end", "busy"):
            if row[name] is not None:
                row[name] = round(row[name], 6)
        if self.busy is None:
            del row["busy"]
        return row


def span_of(row: dict[str, Any]) -> Span | None:
    """The span of a line of timeline.jsonl; None if it is not one."""
    try:
        start, end = float(row["start"]), float(row["end"])
        busy = row.get("busy")
        span = Span(
            str(row["actor"]),
            str(row["role"]),
            str(row["phase"]),
            start,
            end,
            int(row["step"]),
            None if busy is None else float(busy),
        )
    except (KeyError, TypeError, ValueError):
        return None
    return span if span.role in get_args(Role) and start <= end else None


@dataclass(slots=True)
class _Lane:
    """One actor. Its calls interrupt what it does in the background."""

    name: str
    role: Role
    ends: float = float("-inf")
    """Nothing starts before; calls that waited for each other start one after the other."""
    doing: str | None = None
    """What goes on in the background, since `since`."""
    since: float = 0.0
    spans: list[Span] = field(default_factory=list)
    """Finished and not written."""

    def add(self, phase: str, start: float, end: float) -> None:
        start = max(start, self.ends)
        if end - start < SHORTEST_S:
            return
        self.ends = end
        last = self.spans[-1] if self.spans else None
        if last is not None and last.phase == phase and start - last.end < MERGE_S:
            busy = last.seconds + end - start
            whole = start <= last.end and last.busy is None
            self.spans[-1] = replace(last, end=end, busy=None if whole else busy)
        else:
            self.spans.append(Span(self.name, self.role, phase, start, end, 0))

    def interrupt(self, now: float) -> None:
        """Finish the piece of background work so far."""
        if self.doing is not None:
            self.add(self.doing, self.since, now)
            self.since = now


def unix_clock() -> Callable[[], float]:
    """Unix seconds that never go back: only the beginning is the system's clock."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class Timeline:
    """Records spans of all actors as the driver sees them: from a call to its answer.

    Everything is measured on the driver's clock, so clocks of other nodes do not matter. Any
    thread may call the methods.

    Args:
        write: gets spans of a step, a few times a step; None: nothing is recorded unless somebody
            is added to `writers`.
        clock: unix seconds; tests have their own.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Span]], object] | None = None,
        clock: Callable[[], float] | None = None,
    ):
        self.writers = [] if write is None else [write]
        """Called with the spans of a step, a few times a step."""
        self.clock = clock or unix_clock()
        self._lanes: dict[str, _Lane] = {}
        self._step = 0
        self._written_at = self.clock()
        self._lock = threading.RLock()
        self.on_step: list[Callable[[int | None], object]] = []
        """Called with each step that begins, after the spans of the one before were written, and
        with None at the end of the run."""

    def begin_step(self, step: int) -> PhaseTimer:
        """End the step before; returns the timer of this one, whose phases are the driver's lane.

        Phases do not lie within each other.
        """
        self._end_step()
        self._step = step
        for call in self.on_step:
            call(step)
        return PhaseTimer(self.clock, partial(self.add, DRIVER, "driver"))

    def add(self, actor: str, role: Role, phase: str, start: float, end: float) -> None:
        """Record what an actor did, and has finished."""
        if not self.writers:
            return
        with self._lock:
            lane = self._lane(actor, role)
            if lane.doing is not None and lane.since < start:
                lane.interrupt(start)
            lane.add(phase, start, end)
            lane.since = max(lane.since, end)
            self._write_some()

    def now_doing(self, actor: str, role: Role, phase: str | None) -> None:
        """Note what an actor does in the background from now on; None: nothing."""
        if not self.writers:
            return
        with self._lock:
            lane = self._lane(actor, role)
            if lane.doing == phase:
                return
            now = self.clock()
            lane.interrupt(now)
            lane.doing, lane.since = phase, now
            self._write_some()

    def answers(self, role: Role, phase: str) -> Callable[[str], None]:
        """For calls that are made now: what to call with the name of each actor that answers."""
        start = self.clock()
        return lambda actor: self.add(actor, role, phase, start, self.clock())

    @contextmanager
    def doing(self, actors: Iterable[str], role: Role, phase: str) -> Iterator[None]:
        """Note what actors do during the body, but for calls to them, also if it raises."""
        names = list(actors)
        for name in names:
            self.now_doing(name, role, phase)
        try:
            yield
        finally:
            for name in names:
                self.now_doing(name, role, None)

    def close(self) -> None:
        """Write what is left; a second call does nothing."""
        self._end_step()
        calls, self.on_step = self.on_step, []
        for call in calls:
            call(None)

    def _lane(self, actor: str, role: Role) -> _Lane:
        return self._lanes.setdefault(actor, _Lane(actor, role))

    def _end_step(self) -> None:
        """Cut what goes on: no span reaches into two steps."""
        if not self.writers:
            return
        with self._lock:
            now = self.clock()
            for lane in self._lanes.values():
                lane.interrupt(now)
            self._write_finished(now)

    def _write_some(self) -> None:
        now = self.clock()
        if now - self._written_at >= WRITE_EVERY_S:
            self._write_finished(now)

    def _write_finished(self, now: float) -> None:
        self._written_at = now
        spans: list[Span] = []
        for lane in self._lanes.values():
            spans += [replace(span, step=self._step) for span in lane.spans]
            lane.spans.clear()
        if spans:
            spans.sort(key=lambda span: span.start)
            for write in self.writers:
                write(spans)
