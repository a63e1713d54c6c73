"""Spans: nothing overlaps within a lane, nothing is negative, nothing gets lost at a step's end."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.timeline.spans import MERGE_S, WRITE_EVERY_S, Span, Timeline, span_of


class Recorded:
    """A timeline whose clock the test moves; `spans` is what was written."""

    def __init__(self):
        self.now = 1000.0
        self.spans: list[Span] = []
        self.line = Timeline(self.spans.extend, lambda: self.now)

    def written(self) -> list[tuple[str, str, float, float, int]]:
        self.line.close()
        return [
            (s.actor, s.phase, s.start - 1000, s.end - 1000, s.step)
            for s in sorted(self.spans, key=lambda s: (s.actor, s.start))
        ]


@pytest.fixture
def recorded():
    return Recorded()


def test_phases_of_the_timer_are_the_lane_of_the_driver(recorded):
    timer = recorded.line.begin_step(7)
    for phase, seconds in [("rollout", 3.0), ("policy_update", 2.0)]:
        with timer(phase):
            recorded.now += seconds
    assert recorded.written() == [
        ("driver", "rollout", 0.0, 3.0, 7),
        ("driver", "policy_update", 3.0, 5.0, 7),
    ]
    assert timer.metrics() == {"time/rollout": 3.0, "time/policy_update": 2.0, "time/step": 5.0}


def test_each_actor_ends_when_it_answers(recorded):
    answers = recorded.line.answers("policy", "update")
    for name in ("policy rank 1", "policy rank 0"):
        recorded.now += 1
        answers(name)
    assert recorded.written() == [
        ("policy rank 0", "update", 0.0, 2.0, 0),
        ("policy rank 1", "update", 0.0, 1.0, 0),
    ]


def test_a_call_interrupts_what_goes_on_in_the_background(recorded):
    recorded.line.now_doing("engine", "rollout", "sample")
    recorded.now += 2
    answers = recorded.line.answers("rollout", "weight_sync")
    recorded.now += 1
    answers("engine")
    recorded.now += 4
    recorded.line.now_doing("engine", "rollout", None)
    recorded.now += 5
    assert recorded.written() == [
        ("engine", "sample", 0.0, 2.0, 0),
        ("engine", "weight_sync", 2.0, 3.0, 0),
        ("engine", "sample", 3.0, 7.0, 0),
    ]


def test_calls_that_waited_for_each_other_follow_each_other(recorded):
    pausing, receiving = (recorded.line.answers("rollout", p) for p in ("pause", "receive"))
    recorded.now += 1
    pausing("engine")
    recorded.now += 1
    receiving("engine")
    assert recorded.written() == [
        ("engine", "pause", 0.0, 1.0, 0),
        ("engine", "receive", 1.0, 2.0, 0),
    ]


def test_what_goes_on_is_cut_where_a_step_ends(recorded):
    recorded.line.begin_step(1)
    recorded.line.now_doing("engine", "rollout", "sample")
    recorded.now += 2
    recorded.line.begin_step(2)
    recorded.now += 3
    assert recorded.written() == [
        ("engine", "sample", 0.0, 2.0, 1),
        ("engine", "sample", 2.0, 5.0, 2),
    ]


def test_short_gaps_do_not_make_spans_and_are_not_counted_as_work(recorded):
    for _ in range(3):
        recorded.line.now_doing("worker", "reward", "countdown")
        recorded.now += 0.5
        recorded.line.now_doing("worker", "reward", None)
        recorded.now += MERGE_S / 2
    recorded.now += 1
    recorded.line.now_doing("worker", "reward", "countdown")
    recorded.now += 1
    recorded.line.close()
    first, second = recorded.spans
    assert first.seconds == pytest.approx(1.5)
    assert first.end - first.start == pytest.approx(1.5 + MERGE_S)
    assert second.busy is None


def test_an_error_in_the_body_ends_the_span(recorded):
    def fail() -> None:
        with recorded.line.doing(["rank"], "policy", "restart"):
            recorded.now += 2
            raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        fail()
    recorded.now += 2
    assert recorded.written() == [("rank", "restart", 0.0, 2.0, 0)]


def test_a_long_step_is_written_before_it_ends(recorded):
    recorded.line.begin_step(1)
    recorded.line.add("rank", "policy", "update", 1000.0, 1001.0)
    recorded.now += WRITE_EVERY_S
    assert recorded.spans == []
    recorded.line.add("rank", "policy", "logprobs", 1001.0, 1002.0)
    assert [span.phase for span in recorded.spans] == ["update", "logprobs"]


def test_without_a_writer_nothing_is_kept():
    line = Timeline()
    line.begin_step(1)
    line.now_doing("engine", "rollout", "sample")
    line.add("rank", "policy", "update", 0.0, 1.0)
    line.close()
    assert line._lanes == {}


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["call", "begin", "end", "step"]),
        st.sampled_from(["a", "b"]),
        st.floats(0.0, 3.0),
        st.floats(0.0, 2.0),
    ),
    max_size=40,
)


@given(EVENTS)
def test_no_span_is_negative_or_overlaps_another_of_its_lane_or_reaches_into_two_steps(events):
    recorded = Recorded()
    borders = {0: 1000.0}
    for step, (kind, actor, seconds, earlier) in enumerate(events, start=1):
        recorded.now += seconds
        if kind == "call":  # which may have been made before others ended
            start = recorded.now - earlier
            recorded.line.add(actor, "policy", f"call {step}", start, recorded.now)
        elif kind == "step":
            recorded.line.begin_step(step)
            borders[step] = recorded.now
        else:
            doing = "sample" if kind == "begin" else None
            recorded.line.now_doing(actor, "policy", doing)
    recorded.line.close()
    by_actor = sorted(recorded.spans, key=lambda s: (s.actor, s.start))
    for _, lane in groupby(by_actor, key=lambda s: s.actor):
        end = 0.0
        for span in lane:
            assert end <= span.start < span.end <= recorded.now
            assert 0 < span.seconds <= span.end - span.start + 1e-9
            end = span.end
    for step, border in borders.items():
        assert all(s.end <= border for s in recorded.spans if s.step < step)


def test_a_line_of_the_file_is_read_as_it_was_written():
    whole = Span("rank", "policy", "update", 1.5, 2.5, 3)
    with_gaps = Span("worker", "reward", "countdown", 1.5, 2.5, 3, busy=0.25)
    for span in (whole, with_gaps):
        assert span_of(span.row()) == span
    assert "busy" not in whole.row()


@pytest.mark.parametrize(
    "change", [{"start": None}, {"end": 1.0}, {"role": "cook"}, {"step": "x"}, {"busy": []}]
)
def test_a_line_that_is_not_a_span_is_none(change):
    assert span_of({**Span("rank", "policy", "update", 1.5, 2.5, 3).row(), **change}) is None
