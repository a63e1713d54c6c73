"""Preference training, reward models and distillation on one GPU, as a user starts them."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PYTHONPATH
from gpu_cases import DEVICE
from run_cases import RunProcess, own_environment

from rlsys.files import read_jsonl

pytestmark = pytest.mark.gpu(1)

EXAMPLES = Path(__file__).parents[2] / "examples"


def environment():
    return own_environment() | {"PYTHONPATH": PYTHONPATH}


def prepared(folder, example, *words):
    """The folder of the rows and models that a script of an example makes up."""
    script = str(EXAMPLES / example)
    command = [sys.executable, script, "--out", str(folder), *words]
    subprocess.run(command, env=environment(), check=True)
    return folder


def run(folder, subcommand, config, **fields):
    """The metrics of a run of an example on the GPU."""
    folder.mkdir()
    fields = {"output_dir": "out", "device": DEVICE} | fields
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    path = str(EXAMPLES / config)
    started = RunProcess(folder, path, *words, subcommand=subcommand, environment=environment())
    try:
        assert started.wait() == 0, started.log[-4000:]
    finally:
        started.end()
    rows = list(read_jsonl(started.out.metrics))
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, int | float)]
        assert all(math.isfinite(number) for number in numbers), row
    return rows


def held_out(rows, name):
    return [row[f"eval/{name}"] for row in rows if f"eval/{name}" in row]


def test_a_reward_model_and_a_policy_learn_from_pairs(tmp_path):
    size = ("--train", "1200", "--validation", "64")
    data = prepared(tmp_path / "data", "reward_model/prepare.py", *size)
    given = {
        "data.dataset": data / "pairs.jsonl",
        "data.val_dataset": data / "pairs_held_out.jsonl",
        "model.path": data / "model",
    }
    config = "reward_model/reward_model.yaml"
    rows = run(tmp_path / "reward", "reward-model", config, **given, max_steps=75)
    accuracies = held_out(rows, "accuracy")
    assert accuracies[0] < 0.8
    assert accuracies[-1] > 0.9

    given |= {"data.max_length": 128, "max_steps": 40, "eval_steps": 20}
    given |= {"policy.lr": 1e-3, "model.dtype": "auto"}
    for name, changes in {"dpo": {}, "lora": {"policy.lora.rank": 8, "policy.lr": 1e-2}}.items():
        rows = run(tmp_path / name, "preference", "preference/demo.yaml", **given | changes)
        accuracies = held_out(rows, "rewards/accuracies")
        assert accuracies[0] == 0, name  # the policy is the reference
        assert accuracies[-1] > 0.9, name


def test_a_student_comes_nearer_to_a_teacher_on_its_gpu(tmp_path):
    size = ("--rows", "2000", "--validation", "64")
    data = prepared(tmp_path / "data", "distillation/prepare.py", *size)
    given = {
        "data.dataset": data / "train.jsonl",
        "data.val_dataset": data / "validation.jsonl",
        "model.path": data / "student",
        "teacher.path": data / "teacher",
    }
    steps = {"max_steps": 40, "eval_steps": 20}
    rows = run(tmp_path / "run", "distill", "distillation/demo.yaml", **given, **steps)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    assert len(set(held_out(rows, "teacher/loss"))) == 1
