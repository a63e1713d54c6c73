"""Fewer spans for a picture: what may not get lost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlsys.dashboard.timeline import thinned
from rlsys.records import SpanTable


@st.composite
def lanes(draw):
    """Spans of a few actors, which do not overlap within an actor."""
    rows = []
    for actor in range(draw(st.integers(1, 4))):
        time = draw(st.floats(0, 5))
        for _ in range(draw(st.integers(1, 120))):
            length = draw(st.sampled_from([0.001, 0.01, 0.5, 20.0]))
            rows.append((actor, draw(st.integers(0, 2)), time, time + length))
            time += length + draw(st.sampled_from([0.0, 0.0, 0.02, 5.0]))
    actor, phase, start, end = map(np.array, zip(*rows, strict=True))
    return SpanTable(
        *(["a", "b", "c", "d"], ["policy"] * 4, ["x", "y", "z"]),
        *(actor.astype(np.int32), phase.astype(np.int32), start, end, end - start),
        np.arange(len(rows)),
    )


@given(lanes(), st.integers(20, 200))
def test_work_and_lanes_stay_and_the_number_is_bounded(spans, points):
    shown = thinned(spans, points)
    assert len(shown) <= max(points + 3 * len(spans.actors), 1)
    for actor in np.unique(spans.actor):
        whole, part = spans.chosen(spans.actor == actor), shown.chosen(shown.actor == actor)
        assert np.isclose(part.busy.sum(), whole.busy.sum())
        assert (part.start.min(), part.end.max()) == (whole.start.min(), whole.end.max())
        assert (part.end[:-1] <= part.start[1:] + 1e-9).all()
    assert (shown.busy <= shown.end - shown.start + 1e-9).all()


@given(lanes(), st.integers(20, 200))
def test_long_spans_stay_as_they_are(spans, points):
    shown = thinned(spans, points)
    lanes = len(np.unique(spans.actor))
    width = 3 * (spans.end.max() - spans.start.min()) * lanes / points
    kept = set(zip(shown.actor, shown.phase, shown.start, shown.end, strict=True))
    long = spans.chosen(spans.end - spans.start >= width)
    if len(spans) > points:
        assert set(zip(long.actor, long.phase, long.start, long.end, strict=True)) <= kept


def test_the_phase_that_takes_most_of_the_time_names_a_piece():
    start = np.arange(1000.0)
    busy = np.where(np.arange(1000) % 3 == 0, 0.9, 0.1)
    spans = SpanTable(
        *(["a"], ["policy"], ["rare", "long"]),
        np.zeros(1000, dtype=np.int32),
        (np.arange(1000) % 3 == 0).astype(np.int32),
        *(start, start + busy, busy, np.arange(1000)),
    )
    assert {row["phase"] for row in thinned(spans, 100).rows()} == {"long"}
