"""Processes of a real run are killed and stopped: it ends as if nothing had happened."""

from __future__ import annotations

import pytest
from fault_runs import KILL, TABLE, Fault, FaultRun, differences, write_fault_sft_run

pytestmark = pytest.mark.system


@pytest.mark.slow
def test_a_killed_policy_changes_nothing_of_supervised_training(starter, tmp_path):
    """The short part of the table: two runs side by side, of one actor each."""
    for name in ("disturbed", "alone"):
        write_fault_sft_run(tmp_path / name, starter)
    alone = FaultRun(tmp_path / "alone", "run.yaml", subcommand="sft")
    run = FaultRun(tmp_path / "disturbed", "run.yaml", subcommand="sft")
    try:
        outcome = run.watch(run.hit(Fault("policy", "update", KILL, "update")))
        assert outcome.noticed_s is not None
        assert (run.wait(), alone.wait()) == (0, 0), run.log
    finally:
        run.end()
        alone.end()
    assert differences(run.results(), alone.results()) == [], run.log
    assert len(alone.results()["metrics"]) == 30


@pytest.mark.slow
@pytest.mark.parametrize("role", TABLE)
def test_a_run_ends_as_if_nothing_had_happened(start, undisturbed, role):
    run = start(role)
    for fault in TABLE[role]:
        print(run.watch(run.hit(fault)).as_row())
    assert run.wait() == 0, run.log
    assert differences(run.results(), undisturbed) == [], run.log
    assert len(undisturbed["metrics"]) == 24


def test_a_difference_in_a_bit_is_found():
    left = {"metrics": [{"step": 1, "loss": 0.1}], "completions": [{"step": 1}], "weights": {}}
    right = {"metrics": [{"step": 1, "loss": 0.1}], "completions": [{"step": 1}], "weights": {}}
    assert differences(left, right) == []
    right["metrics"] = [{"step": 1, "loss": 0.1 + 1e-17 + 2e-17}, {"step": 2}]
    right["completions"] = [{"step": 1, "text": "a"}]
    right["weights"] = {"final": "0"}
    found = differences(left, right)
    assert [line.partition(":")[0] for line in found] == [
        "step 1, loss",
        "step 2, step",
        "completions, first in step 1",
        "weights",
    ]
