"""`rlsys grpo` with policy, engine and reference on the same GPU, as a user starts it."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from conftest import PYTHONPATH
from gpu_cases import DEVICE
from run_cases import own_environment, run_config, write_run_files, write_starter

pytestmark = pytest.mark.gpu(1)

LAYOUTS = {
    "everything leaves": {"colocated": {"offload_weights": True}},
    "weights stay": {"colocated": {"offload_weights": False}},
    "nothing leaves": {"colocated": {"offload_weights": False, "offload_optimizer": False}},
    "merged LoRA": {"policy": {"lora": {"rank": 8}}},
    "adapter": {"policy": {"lora": {"rank": 8}}, "weight_sync": {"lora": "adapter"}},
    "gloo": {"weight_sync": {"transport": "gloo"}},
}


def run(folder, **sections):
    """Exit code, log and the rows of metrics.jsonl."""
    values = yaml.safe_load((folder / "run.yaml").read_text())
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields if isinstance(fields, dict) else fields
    (folder / "changed.yaml").write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-m", "rlsys.cli", "grpo", "changed.yaml"],
        cwd=folder,
        env=own_environment() | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").open()]
    return done.stdout, [row for row in rows if "loss" in row]


def write_run(folder):
    """run.yaml of a colocated run of 4 steps, its starter model and its data."""
    write_starter(folder / "starter")
    write_run_files(folder, folder / "starter")
    config = run_config(folder / "starter") | {"device": DEVICE, "placement": "colocated"}
    config["rollout"] |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_mb": 256}
    config["policy"]["lr"] = 1e-5
    config["checkpoint"] = {"save_steps": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Layout -> `run` of it, for the layouts that are tested: side by side, starting is slow."""
    tested = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    folders = {
        layout: tmp_path_factory.mktemp(layout.replace(" ", "_"))
        for layout in LAYOUTS
        if {"layout": layout} in tested
    }
    for folder in folders.values():
        write_run(folder)
    with ThreadPoolExecutor(len(folders) if DEVICE == "cuda" else 1) as threads:
        running = {
            layout: threads.submit(run, folder, **LAYOUTS[layout])
            for layout, folder in folders.items()
        }
    return running


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_policy_that_is_trained_is_the_one_that_sampled(runs, layout):
    log, steps = runs[layout].result()
    assert "taking turns on the same GPUs" in log
    assert [row["policy_version"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        numbers = [value for value in row.values() if isinstance(value, int | float)]
        assert all(math.isfinite(number) for number in numbers), row
        assert 0 < row["sampling/logp_difference/mean"] < 0.05  # nats: what bfloat16 explains
        assert row["weight_sync/bytes"] > 0
    names = ("colocated/to_policy_seconds", "colocated/to_rollouts_seconds", "weight_sync/seconds")
    print(json.dumps({layout: {name: [row[name] for row in steps] for name in names}}))


def test_a_run_is_continued_from_what_was_saved_while_the_optimizer_was_away(tmp_path):
    write_run(tmp_path)
    _, whole = run(tmp_path)
    log, steps = run(tmp_path, checkpoint={"save_steps": 2, "resume": 2})
    assert "continuing from" in log
    assert "step-2" in log
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row, expected in zip(steps, whole, strict=True):
        assert row["learning_rate"] == pytest.approx(expected["learning_rate"])
        assert 0 < row["sampling/logp_difference/mean"] < 0.05
