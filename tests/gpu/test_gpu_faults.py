"""Engine and policy of a run on two GPUs are killed and stopped: it heals itself and ends well."""

import json
import math
import sys
from pathlib import Path

import pytest
from conftest import PYTHONPATH
from gpu_cases import DEVICE
from run_cases import own_environment, write_starter

from rlsys.files import read_jsonl

sys.path.insert(1, str(Path(__file__).parents[1] / "faults"))

from fault_runs import KILL, STOP, Fault, FaultRun, write_fault_run

pytestmark = pytest.mark.gpu(2)

FAULTS = (
    Fault("policy", "update", KILL, "update"),
    Fault("engine", "sampling", KILL, "generate"),
    Fault("policy", "weight sync", STOP, "send_weights"),
    Fault("engine", "weight sync", STOP, "update_weights"),
)
"""The policy's come while another engine than before is there, too."""
HEARTBEAT_S = 10.0
STEPS = 48


def test_a_run_heals_itself_on_gpus(tmp_path):
    """Bits are compared on CPU, in tests/faults: kernels of GPUs add up in no fixed order."""
    write_starter(tmp_path / "starter")
    folder = tmp_path / "run"
    alive = {"heartbeat_s": HEARTBEAT_S}
    engine = {"kv_cache_memory_mb": 256, "gpu_memory_utilization": 0.2}
    write_fault_run(
        folder,
        tmp_path / "starter",
        device=DEVICE,
        max_steps=STEPS,
        rollout=alive | engine,
        policy=alive | {"lr": 1e-4},
        reward=alive,
    )
    run = FaultRun(folder, "run.yaml", environment=own_environment() | {"PYTHONPATH": PYTHONPATH})
    try:
        for fault in FAULTS:
            outcome = run.meet(fault)
            print(json.dumps(outcome.as_row()), flush=True)
            assert outcome.error is None, f"{fault}: {outcome.error}\n{run.log}"
        assert run.wait() == 0, run.log
    finally:
        run.end()
    rows = [row for row in read_jsonl(run.out.metrics) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["policy_version"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, int | float)]
        assert all(math.isfinite(number) for number in numbers), row
        # On-policy, in bfloat16: weights that were lost or old on one side would show here.
        assert row["sampling/logp_difference/mean"] < 0.05, row
