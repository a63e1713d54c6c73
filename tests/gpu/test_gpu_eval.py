"""`rlsys infer` and `rlsys eval` on a GPU as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_cases import DEVICE
from tiny_models import save_tiny_qwen3

import rlsys as package
from rlsys.files import read_jsonl

pytestmark = pytest.mark.gpu(1)

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
LITTLE = "0.05"
"""Share of the GPU: other tests use it too."""


def rlsys(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", "rlsys.cli", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, prompts and a config."""
    folder = tmp_path_factory.mktemp("gpu-eval")
    for seed in (1, 2):
        save_tiny_qwen3(folder / f"model-{seed}", tied=True, seed=seed)
        (folder / f"model-{seed}/chat_template.jinja").write_text(TEMPLATE)
    rows = [{"prompt": f"{i} + {i}", "solution": str(2 * i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "output_dir": "unused",
        "max_steps": 1,
        "device": DEVICE,
        "data": {
            "dataset": ["rows.jsonl"],
            "val_sets": {"sums": "rows.jsonl"},
            "max_prompt_length": 64,
        },
        "model": {"path": "model-1"},
        "rollout": {
            "generation_batch_size": 8,
            "max_completion_length": 16,
            "gpu_memory_utilization": float(LITTLE),
        },
        "reward": {"reward_funcs": ["format"]},
        "eval": {"num_generations": 4},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def test_a_file_of_prompts(folder):
    words = ["infer", "model-1", "--prompts", "rows.jsonl", "--out", "out.jsonl"]
    words += ["--max_tokens", "16", "--seed", "1", "--device", DEVICE]
    rlsys(folder, *words, "--gpu_memory_utilization", LITTLE)
    rows = list(read_jsonl(folder / "out.jsonl"))
    assert [row["prompt_id"] for row in rows] == [f"rows:{i}" for i in range(1, 9)]
    assert all(row["num_tokens"] <= 16 for row in rows)


def test_two_models_one_after_the_other(folder):
    text = rlsys(folder, "eval", "model-1", "model-2", "config.yaml", "--out", "out")
    assert "pass@4" in text
    found = {seed: list(read_jsonl(folder / f"out/model-{seed}/eval_completions.jsonl"))
             for seed in (1, 2)}  # fmt: skip
    assert {seed: len(rows) for seed, rows in found.items()} == {1: 32, 2: 32}
    assert len({row["text"] for row in found[1]} & {row["text"] for row in found[2]}) < 16
