"""What each actor did when, thinned for a picture, and the shares of phases."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.dashboard.queries import TimelineQuery
from rlsys.records import RunRecord, SpanTable
from rlsys.timeline.shares import TimeShares
from rlsys.timeline.spans import Span

NEWEST_STEPS = 5
"""What is shown at first."""
MOST_STEPS = 500
"""Steps from which shares are computed; of more, as many evenly spread ones."""


def timeline(run: RunRecord, query: TimelineQuery) -> dict[str, Any]:
    """The spans of a range of time or steps, at most about `points`, and shares of its steps."""
    spans = run.spans()
    chosen = _chosen(spans, query)
    shares, steps = _shares(spans, chosen)
    times = shares.to_json()
    return {
        "actors": sorted(set(spans.actors), key=lambda name: _place(spans, name)),
        "spans": list(thinned(chosen, query.points).rows()),
        "num_spans": len(chosen),
        "start": float(spans.start.min()) if len(spans) else None,
        "end": float(spans.end.max()) if len(spans) else None,
        "shares": {name: part["share"] for name, part in times["phases"].items()},
        "limits": {name: part["share"] for name, part in times["limits"].items()},
        "limited_by": shares.limited_by,
        "idle": {name: part["idle"] for name, part in times["actors"].items()},
        "steps": [int(steps[0]), int(steps[-1])] if len(steps) else None,
        "num_steps": len(steps),
        "steps_of_shares": len(shares.steps),
    }


def _place(spans: SpanTable, name: str) -> tuple[int, int]:
    """The driver first, then roles in the order of their first span, then names in theirs."""
    place = spans.actors.index(name)
    role = spans.roles[place]
    return (-1 if role == "driver" else spans.roles.index(role)), place


def _chosen(spans: SpanTable, query: TimelineQuery) -> SpanTable:
    if query.start is not None or query.end is not None:
        start = -np.inf if query.start is None else query.start
        return spans.overlapping(start, np.inf if query.end is None else query.end)
    if not len(spans):
        return spans
    newest = int(spans.step.max())
    last = newest if query.to_step is None else query.to_step
    first = last - NEWEST_STEPS + 1 if query.from_step is None else query.from_step
    return spans.of_steps(first, last)


def _shares(spans: SpanTable, chosen: SpanTable) -> tuple[TimeShares, NDArray[np.int64]]:
    """Shares of the steps of which a span is chosen, and these steps."""
    shares = TimeShares()
    steps = np.unique(chosen.step)
    if not len(steps):
        return shares, steps
    sample = steps[np.unique(np.linspace(0, len(steps) - 1, MOST_STEPS).astype(int))]
    of_sample = spans.chosen(np.isin(spans.step, sample))
    order = np.argsort(of_sample.step, kind="stable")
    rows = list(of_sample.chosen(order).rows())
    bounds = np.flatnonzero(np.diff(of_sample.step[order])) + 1
    for first, last in zip([0, *bounds], [*bounds, len(rows)], strict=True):
        shares.add_step([Span(**row) for row in rows[first:last]])
    return shares, steps


def thinned(spans: SpanTable, points: int) -> SpanTable:
    """At most about `points` spans that look the same from afar.

    Spans that are wide enough to be seen stay as they are. Short ones beside each other become one,
    of the phase that took most of the time; `busy` is how much of it was work.

    Args:
        spans: of all actors.
        points: the number that is enough.
    """
    if len(spans) <= points:
        return spans
    spans = spans.chosen(np.lexsort((spans.start, spans.actor)))
    begin = spans.start.min()
    # In each stretch of this width a lane has at most one long span and two pieces of short ones.
    width = 3 * (spans.end.max() - begin) * len(np.unique(spans.actor)) / points
    is_long = spans.end - spans.start >= width
    stretch = ((spans.start - begin) / width).astype(np.int64)
    changes = np.zeros(len(spans), dtype=bool)
    changes[0] = True
    for values in (spans.actor, stretch):
        changes[1:] |= np.diff(values) != 0
    changes |= is_long
    changes[1:] |= is_long[:-1]
    first = np.flatnonzero(changes)
    piece = np.cumsum(changes) - 1
    # Seconds of each phase in each piece: the greatest names it.
    seconds = np.zeros((len(first), len(spans.phases)))
    np.add.at(seconds, (piece, spans.phase), spans.busy)
    return SpanTable(
        spans.actors,
        spans.roles,
        spans.phases,
        spans.actor[first],
        seconds.argmax(axis=1).astype(np.int32),
        spans.start[first],
        np.maximum.reduceat(spans.end, first),
        np.add.reduceat(spans.busy, first),
        spans.step[first],
    )
