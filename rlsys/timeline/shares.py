"""Shares of time: of each phase, of each actor's idleness, and what limited the steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from rlsys.timeline.spans import DRIVER, Span

WAITING = "rollout"
"""The driver's phase in which it waits for engines and rewards."""
SAMPLING, REWARD, OTHER = "sampling", "reward", "other"
PROFILE = "profile"
"""The driver's phase in which a profile is started or written. It counts for nothing, like what
actors did meanwhile."""


@dataclass(slots=True)
class ActorTime:
    """One actor over some steps."""

    role: str
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of work by phase."""

    @property
    def busy(self) -> float:
        """Seconds of work."""
        return sum(self.phases.values())


@dataclass(slots=True)
class TimeShares:
    """Where the time of some steps went. All numbers are seconds; shares are of `seconds`."""

    seconds: float = 0.0
    """Wall time of the steps, evaluations and checkpoints after them included."""
    steps: list[int] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The driver's phases; the rest is `other`."""
    limits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """What the run waited for: the phases, with rollout split into the time in which an engine
    sampled (`sampling`), the time in which only rewards were computed (`reward`), and `other`."""
    actors: dict[str, ActorTime] = field(default_factory=dict)
    """All but those of the driver's process, by name."""

    @property
    def limited_by(self) -> str | None:
        """What the run waited for most; None without steps."""
        return max(self.limits, key=lambda name: self.limits[name]) if self.limits else None

    def idle_share(self, actor: str) -> float:
        """Share of the time in which an actor had nothing to do."""
        return max(0.0, 1 - self.actors[actor].busy / self.seconds) if self.seconds else 0.0

    def idle_shares(self) -> dict[str, float]:
        """`idle_share` by role, mean over its actors."""
        by_role: dict[str, list[float]] = defaultdict(list)
        for name, actor in self.actors.items():
            by_role[actor.role].append(self.idle_share(name))
        return {role: sum(shares) / len(shares) for role, shares in by_role.items()}

    def share(self, seconds: float) -> float:
        """A number of seconds as a share of all."""
        return seconds / self.seconds if self.seconds else 0.0

    def add_step(self, spans: Sequence[Span]) -> None:
        """Add a step.

        Args:
            spans: all of the step; without the driver's they count for nothing.
        """
        profiling = [s for s in spans if s.actor == DRIVER and s.phase == PROFILE]
        for pause in profiling:
            spans = [part for span in spans for part in _outside(span, pause)]
        driver = [span for span in spans if span.actor == DRIVER]
        if not driver:
            return
        seconds = max(span.end for span in driver) - min(span.start for span in driver)
        self.seconds += seconds
        self.steps.append(driver[0].step)
        phases: dict[str, float] = defaultdict(float)
        for span in driver:
            phases[span.phase] += span.seconds
        phases[OTHER] += max(0.0, seconds - sum(phases.values()))
        limits = {name: value for name, value in phases.items() if name != WAITING}
        waits = [(span.start, span.end) for span in driver if span.phase == WAITING]
        sampling = _within(waits, _of_role(spans, "rollout"))
        scoring = _without(_within(waits, _of_role(spans, "reward")), sampling)
        limits[SAMPLING] = _length(sampling)
        limits[REWARD] = _length(scoring)
        limits[OTHER] += max(0.0, _length(waits) - limits[SAMPLING] - limits[REWARD])
        for name, value in phases.items():
            self.phases[name] += value
        for name, value in limits.items():
            if value:
                self.limits[name] += value
        for span in spans:
            if span.role != "driver":
                actor = self.actors.setdefault(span.actor, ActorTime(span.role))
                actor.phases[span.phase] += span.seconds

    def to_json(self) -> dict[str, Any]:
        """As a page or a file wants it."""
        return {
            "seconds": self.seconds,
            "steps": len(self.steps),
            "first_step": min(self.steps, default=None),
            "last_step": max(self.steps, default=None),
            "phases": self._with_shares(self.phases),
            "limits": self._with_shares(self.limits),
            "limited_by": self.limited_by,
            "idle": self.idle_shares(),
            "actors": {
                name: {
                    "role": actor.role,
                    "idle": self.idle_share(name),
                    "phases": self._with_shares(actor.phases),
                }
                for name, actor in self.actors.items()
            },
        }

    def _with_shares(self, seconds: dict[str, float]) -> dict[str, dict[str, float]]:
        return {
            name: {"seconds": value, "share": self.share(value)} for name, value in seconds.items()
        }


def _outside(span: Span, pause: Span) -> list[Span]:
    """The parts of a span before and after a pause."""
    if span.end <= pause.start or pause.end <= span.start:
        return [span]
    parts = [(span.start, min(span.end, pause.start)), (max(span.start, pause.end), span.end)]
    return [replace(span, start=start, end=end) for start, end in parts if start < end]


def time_shares(spans: Iterable[Span]) -> TimeShares:
    """Where the time went in these spans, which come step by step, as timeline.jsonl has them."""
    shares = TimeShares()
    for _, of_step in groupby(spans, key=lambda span: span.step):
        shares.add_step(list(of_step))
    return shares


_Pieces = list[tuple[float, float]]
"""Times from, to; sorted and apart from each other."""


def _of_role(spans: Iterable[Span], role: str) -> _Pieces:
    """When at least one actor of a role worked. Short gaps inside spans count as work."""
    pieces: _Pieces = []
    for start, end in sorted((span.start, span.end) for span in spans if span.role == role):
        if pieces and start <= pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(end, pieces[-1][1]))
        else:
            pieces.append((start, end))
    return pieces


def _within(waits: _Pieces, pieces: _Pieces) -> _Pieces:
    """The parts of `pieces` that lie in `waits`."""
    found = [
        (max(start, begin), min(end, until)) for begin, until in waits for start, end in pieces
    ]
    return [(start, end) for start, end in found if start < end]


def _without(pieces: _Pieces, others: _Pieces) -> _Pieces:
    """`pieces` without the parts that lie in `others`."""
    for begin, until in others:
        pieces = [
            part
            for start, end in pieces
            for part in ((start, min(end, begin)), (max(start, until), end))
            if part[0] < part[1]
        ]
    return pieces


def _length(pieces: _Pieces) -> float:
    return sum(end - start for start, end in pieces)
