"""Shares: computed by hand for steps that are drawn here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.timeline.shares import TimeShares, time_shares
from rlsys.timeline.spans import Span


def driver(phase: str, start: float, end: float, step: int = 1) -> Span:
    return Span("driver", "driver", phase, start, end, step)


def engine(start: float, end: float, step: int = 1, name: str = "engine 0") -> Span:
    return Span(name, "rollout", "sample", start, end, step)


def reward(start: float, end: float, step: int = 1, busy: float | None = None) -> Span:
    return Span("reward worker 0", "reward", "slow", start, end, step, busy)


def policy(start: float, end: float, step: int = 1) -> Span:
    return Span("policy rank 0", "policy", "update", start, end, step)


STEP = [
    driver("rollout", 0, 5),
    engine(0, 3),
    reward(1, 4),
    driver("policy_update", 5, 8),
    policy(5, 8),
    driver("weight_sync", 9, 10),
]


def test_a_rollout_is_split_into_what_was_waited_for():
    shares = time_shares(STEP)
    assert shares.seconds == 10
    assert shares.phases == {"rollout": 5, "policy_update": 3, "weight_sync": 1, "other": 1}
    # Engines sample until 3, rewards alone go on until 4, and until 5 nobody works.
    assert shares.limits == {
        **{"sampling": 3, "reward": 1, "policy_update": 3, "weight_sync": 1},
        "other": 2,
    }
    assert sum(shares.limits.values()) == shares.seconds
    assert shares.limited_by in ("sampling", "policy_update")


def test_idle_shares_are_of_each_actor_and_of_the_mean_of_a_role():
    shares = time_shares([*STEP, engine(0, 10, name="engine 1")])
    assert shares.idle_share("engine 0") == pytest.approx(0.7)
    assert shares.idle_share("policy rank 0") == pytest.approx(0.7)
    assert shares.idle_shares() == pytest.approx({"rollout": 0.35, "reward": 0.7, "policy": 0.7})


def test_sampling_during_the_update_is_work_but_nothing_that_was_waited_for():
    shares = time_shares([driver("rollout", 0, 1), driver("policy_update", 1, 4), engine(0, 4)])
    assert shares.limits["sampling"] == 1
    assert shares.limits["policy_update"] == 3
    assert shares.idle_share("engine 0") == 0


def test_steps_add_up_and_the_time_between_processes_is_not_counted():
    second = [driver("rollout", 1000, 1004, step=2), engine(1000, 1002, step=2)]
    shares = time_shares([*STEP, *second])
    assert shares.seconds == 14
    assert shares.steps == [1, 2]
    assert shares.phases["rollout"] == 9
    assert shares.limits["sampling"] == 5


def test_gaps_within_a_span_are_not_work():
    shares = time_shares([driver("rollout", 0, 4), reward(0, 4, busy=1.0)])
    assert shares.idle_share("reward worker 0") == pytest.approx(0.75)


def test_what_comes_before_the_first_step_counts_for_nothing():
    shares = time_shares([engine(0, 5, step=0), *STEP])
    assert shares.steps == [1]
    assert shares.idle_share("engine 0") == pytest.approx(0.7)


def test_starting_a_profile_counts_for_nothing():
    profile = driver("profile", -5, 0)
    during = engine(-8, 1)
    shares = time_shares([profile, during, *STEP])
    assert shares.seconds == 10
    assert "profile" not in shares.phases
    assert shares.actors["engine 0"].busy == pytest.approx(3 + 3 + 1)


def test_no_steps_have_no_shares():
    shares = TimeShares()
    assert shares.limited_by is None
    assert shares.to_json()["limits"] == {}
    assert shares.to_json()["first_step"] is None


def test_the_threads_of_the_driver_are_not_actors():
    writer = Span("checkpoint writer", "driver", "write", 0, 9, 1)
    assert list(time_shares([*STEP, writer]).actors) == [
        "engine 0",
        "reward worker 0",
        "policy rank 0",
    ]


TIMES = st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 5)), max_size=8)


@given(TIMES, TIMES, st.floats(1, 10), st.floats(1, 10))
def test_limits_always_add_up_to_the_wall_time(samples, scores, waits, update):
    spans = [driver("rollout", 0, waits), driver("policy_update", waits, waits + update)]
    spans += [engine(start, start + length) for start, length in samples]
    spans += [reward(start, start + length) for start, length in scores]
    shares = time_shares(spans)
    assert sum(shares.limits.values()) == pytest.approx(shares.seconds)
    assert min(shares.limits.values()) >= 0
