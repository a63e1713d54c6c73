"""Processes of a real run are killed and stopped: it ends as if nothing had happened."""

from __future__ import annotations

import pytest
from fault_runs import TABLE, differences

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.mark.parametrize("role", TABLE)
def test_a_run_ends_as_if_nothing_had_happened(start, undisturbed, role):
    run = start(role)
    for fault in TABLE[role]:
        outcome = run.watch(run.hit(fault))
        print(outcome.as_row())
    assert run.wait() == 0, run.log
    assert differences(run.results(), undisturbed) == [], run.log
