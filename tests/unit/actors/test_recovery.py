"""Restarts are bounded, spaced out and counted, and a failure that repeats itself ends a run."""

from __future__ import annotations

import pytest

from rlsys.actors.recovery import SAME_EVENT_S, Restarts
from rlsys.actors.waiting import ActorDeath, ActorFailure
from rlsys.config.schema import RecoveryConfig
from rlsys.problems import RunFailed


class Run:
    """Restarts with a clock that the test moves, and what they print."""

    def __init__(self, **config):
        self.now, self.lines = 0.0, []
        config = RecoveryConfig(**config)
        self.restarts = Restarts(config, say=self.lines.append, clock=lambda: self.now)

    def fail(self, member="rollout engine 0", *, role="rollout", step, reason="it died", after=60):
        self.now += after
        error = ActorDeath(f"Ray's text\n{member} died", actor=member, reason=reason)
        return self.restarts.begin(role, error, phase="sampling", step=step)


def test_nothing_is_replaced_without_restarts():
    run = Run(max_restarts=0)
    with pytest.raises(ActorDeath, match="Ray's text\nrollout engine 0 died"):
        run.fail(step=1)
    assert run.lines == []
    assert run.restarts.metrics() == {}


def test_a_restart_is_one_line_with_cause_and_phase_and_one_with_the_seconds_lost():
    run = Run()
    run.fail(step=3).done()
    first, second = run.lines
    assert first == (
        "note: rollout engine 0 failed in sampling of step 3: it died. Restarting it, restart 1 of "
        "10 within 1 h"
    )
    assert second.startswith("note: rollout engine 0 works again, 0.0 s after")
    metrics = run.restarts.metrics()
    assert metrics["fault/rollout_restarts"] == 1
    assert 0 <= metrics["fault/rollout_seconds_lost"] < 60


def test_a_role_has_its_own_limit_within_a_window():
    run = Run(max_restarts=2, window_hours=0.1)  # 6 minutes
    run.fail(step=1)
    run.fail(step=2)
    run.fail("policy rank 1", role="policy", step=3)
    with pytest.raises(RunFailed, match=r"step 4 \(it died\) after 2 restarts of rollout actors"):
        run.fail(step=4)
    run.fail(step=5, after=300)  # the first two are forgotten
    assert run.restarts.metrics()["fault/rollout_restarts"] == 3


def test_the_second_failure_in_one_place_ends_the_run():
    run = Run()
    run.fail(step=7, reason="pid 17 was killed")
    run.fail(step=8, reason="pid 18 was killed")
    run.fail(step=7, reason="no sign of life")
    with pytest.raises(RunFailed, match="second time in this place"):
        run.fail("rollout engine 1", step=7, reason="pid 20 was killed")


def test_members_that_fail_together_are_one_failure():
    run = Run()
    run.fail("rollout engine 0", step=1)
    run.fail("rollout engine 1", step=1, after=SAME_EVENT_S / 2)
    with pytest.raises(RunFailed, match="second time"):
        run.fail("rollout engine 0", step=1, after=SAME_EVENT_S)


def test_waits_become_longer_up_to_a_minute():
    run = Run(backoff_s=4)
    delays = [run.fail(step=step).delay_s for step in range(8)]
    assert delays == [0, 4, 8, 16, 32, 60, 60, 60]
    assert "Restarting it in 4 s, restart 2 of 10" in run.lines[1]


def test_the_error_that_ends_a_run_has_the_actors_own_text_first():
    run = Run(max_restarts=1)
    run.fail(step=1)
    with pytest.raises(RunFailed) as caught:
        run.fail(step=2)
    assert str(caught.value).startswith("Ray's text\nrollout engine 0 died\n")
    assert isinstance(caught.value.__cause__, ActorFailure)


def test_who_does_not_come_back_is_named_with_what_is_missing():
    run = Run()
    restart = run.fail(step=1)
    run.now += 40
    run.restarts._missing = lambda: "its node is lost"
    assert run.restarts.waiting() == (
        "waiting for rollout engine 0 (40 s) to work again: its node is lost"
    )
    restart.done()
    assert run.restarts.waiting() == ""
