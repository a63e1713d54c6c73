import pytest

from rlsys.timing import PhaseTimer


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_the_step_is_everything_since_construction():
    clock = Clock()
    timer = PhaseTimer(clock)
    clock.now += 1
    for _ in range(2):
        with timer("rollout"):
            clock.now += 2
    with timer("policy_update"):
        clock.now += 4
    assert timer.metrics() == {"time/rollout": 4, "time/policy_update": 4, "time/step": 9}


def test_a_phase_inside_another_counts_for_both():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer("rollout"):
        clock.now += 1
        with timer("reward"):
            clock.now += 2
    assert timer.metrics() == {"time/reward": 2, "time/rollout": 3, "time/step": 3}


def test_an_exception_passes_on_and_leaves_the_timer_usable():
    clock = Clock()
    timer = PhaseTimer(clock)

    def fail() -> None:
        with timer("rollout"):
            clock.now += 3
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        fail()
    with timer("rollout"):
        clock.now += 1
    assert timer.metrics() == {"time/rollout": 4, "time/step": 4}
