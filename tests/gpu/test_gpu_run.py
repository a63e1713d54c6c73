"""`rlsys grpo` on two GPUs as a user starts it: reference on the policy's, sampling ahead."""

import gzip
import json
import math

import pytest
from gpu_cases import DEVICE

pytestmark = pytest.mark.gpu(2)


def test_a_short_run_ends_well_and_its_engines_agree(short_run):
    exit_code, log, rows = short_run()
    assert exit_code == 0, log[-4000:]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 3
    for row in steps:
        numbers = [value for value in row.values() if isinstance(value, int | float)]
        assert all(math.isfinite(number) for number in numbers), row
        assert row["kl"] >= 0
        assert 0 < row["sampling/logp_difference/mean"] < 0.05  # nats: what bfloat16 explains
        assert row["weight_sync/bytes"] > 0
    assert steps[-1]["policy_version"] == 3


def test_a_profile_shows_kernels_and_memory_of_each_gpu(short_run):
    exit_code, log, _ = short_run()
    assert exit_code == 0, log[-4000:]
    folder = short_run.folder / "out/profile"
    with gzip.open(folder / "steps-3-3.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    kernels = {named[event["pid"]] for event in events if event.get("cat") == "kernel"}
    actors = ("policy rank 0", "reference rank 0", "rollout engine 0")
    for actor in actors if DEVICE == "cuda" else ():
        assert any(name.startswith(f"{actor} GPU") for name in kernels), (actor, kernels)
    snapshots = {path.name for path in folder.glob("*.memory.pickle")}
    roles = ("policy", "reference", "rollout") if DEVICE == "cuda" else ()
    assert snapshots == {f"steps-3-3-{role}-0.memory.pickle" for role in roles}
