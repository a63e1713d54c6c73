"""Waiting in tests: with a deadline, and an assertion that says what did not happen."""

import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE_S = 300.0
"""Far beyond what any test waits for, also on a busy machine."""

T = TypeVar("T")


def eventually(condition: Callable[[], T], what: str) -> T:
    """The first true value of `condition`; fails with `what` if it does not come."""
    end = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.01)
    return value
