"""Processes of a real run are killed and stopped: it ends as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from fault_runs import (
    KILL,
    MAX_STEPS,
    NOTICED,
    TABLE,
    Fault,
    FaultRun,
    differences,
    write_fault_sft_run,
)

from rlsys.config import RolloutConfig

pytestmark = pytest.mark.system

BUSY_STEPS = 12


@pytest.mark.slow
def test_a_killed_policy_changes_nothing_of_supervised_training(starter_model, tmp_path):
    """The short part of the table: two runs side by side, of one actor each."""
    for name in ("disturbed", "alone"):
        write_fault_sft_run(tmp_path / name, starter_model)
    alone = FaultRun(tmp_path / "alone", "run.yaml", subcommand="sft")
    run = FaultRun(tmp_path / "disturbed", "run.yaml", subcommand="sft")
    try:
        assert run.meet(Fault("policy", "update", KILL, "update")).error is None, run.log
        assert (run.wait(), alone.wait()) == (0, 0), run.log
    finally:
        run.end()
        alone.end()
    assert differences(run.results(), alone.results()) == [], run.log
    assert len(alone.results()["metrics"]) == 30


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_run_ends_as_if_nothing_had_happened(start, undisturbed, name):
    scenario = TABLE[name]
    run = start(name.replace(" ", "-"), *scenario.words, **scenario.sections)
    for fault in scenario.faults:
        outcome = run.meet(fault)
        print(json.dumps(outcome.as_row()))
        assert outcome.error is None, f"{fault}: {outcome.error}\n{run.log}"
    assert run.wait() == 0, run.log
    expected = undisturbed(scenario.sections)
    assert differences(run.results(), expected) == [], run.log
    assert len(expected["metrics"]) == MAX_STEPS


@pytest.mark.slow
def test_a_busy_machine_is_no_reason_to_kill_anything(start, undisturbed):
    """With the limits that a run has unless its config says otherwise."""
    default = {"heartbeat_s": RolloutConfig.model_fields["heartbeat_s"].default}
    run = start("busy", rollout=default, policy=default, reward=default)
    run.wait_for(run.finished_steps)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(20)]
    try:
        run.wait_for(lambda: run.finished_steps() >= BUSY_STEPS)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert run.wait() == 0, run.log
    assert not NOTICED.search(run.log), run.log
    assert differences(run.results(), undisturbed({})) == []


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
