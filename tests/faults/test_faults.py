"""Processes of a real run are killed and stopped: it ends as if nothing had happened."""

from __future__ import annotations

import pytest
from fault_runs import KILL, Fault, differences

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.mark.parametrize("role", ["reward"])
def test_x(start, undisturbed, role):
    run = start(role)
    for sig in (KILL,):
        out = run.watch(run.hit(Fault(role, "scoring", sig, "generate", of="engine")))
        print(out)
    assert run.wait() == 0, run.log
    print(run.log)
    assert differences(run.results(), undisturbed) == []
