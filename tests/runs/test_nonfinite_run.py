"""Whole runs with numbers that are not finite: they go on, or end with what to do."""

import json

import pytest
import yaml
from run_cases import RunProcess, run_config, write_run_files
from safetensors.torch import load_file
from test_sft_run import write_files as write_sft_files

from rlsys.files import read_jsonl

pytestmark = [pytest.mark.system, pytest.mark.slow]

PLUGIN = '''
"""The advantages of GRPO; those of some steps have a NaN."""

from pathlib import Path

from rlsys.algo.advantages import group_relative, register_advantage_estimator

steps = 0


@register_advantage_estimator("poisoned")
def poisoned(inputs, config):
    global steps
    advantages = group_relative(inputs, config)
    if inputs.mask_NS.shape[1] > 1:  # not what is shown of one group
        steps += 1
        if str(steps) in Path("poison").read_text().split():
            row, token = inputs.mask_NS.nonzero()[3].tolist()
            advantages[row, token] = float("nan")
    return advantages
'''


@pytest.fixture
def folder(starter_model, tmp_path):
    folder = tmp_path / "run"
    write_run_files(folder, starter_model)
    (folder / "poisoned.py").write_text(PLUGIN)
    config = run_config(starter_model) | {"eval_steps": None}
    config["grpo"] |= {"advantage_estimator": "poisoned", "external_plugins": ["poisoned.py"]}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def finished(folder, poison, *words, command="grpo"):
    (folder / "poison").write_text(poison)
    run = RunProcess(folder, "run.yaml", *words, subcommand=command)
    code = run.wait()
    run.end()
    return run, code


def test_a_run_skips_a_poisoned_batch_and_the_step_can_be_replayed(folder):
    run, code = finished(folder, "2")
    assert code == 0, run.log
    rows = [row for row in read_jsonl(run.out.metrics) if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("fault/nonfinite_steps") for row in rows] == [None, 1, None, None]
    assert [row["policy_version"] for row in rows] == [1, 2, 3, 4]
    assert all("grad_norm" in row for row in rows if row["step"] != 2)
    assert "warning: skipped optimizer step 1 of 1 of policy version 1" in run.log
    dump = run.out.dumps / "step-2"
    about = json.loads((dump / "step.json").read_text())
    assert about["found"] == {"loss": 1, "gradient": 1, "advantages": 1}
    # The step changed nothing: the weights before it are those of the checkpoint after it.
    before = load_file(dump / "weights/model.safetensors")
    after = load_file(run.out.checkpoints / "step-2/model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)
    replay = RunProcess(folder, str(dump), subcommand="replay")
    assert replay.wait() == 0, replay.log
    assert "First: batch, advantages of row " in replay.log
    assert "As in the run: loss, gradient, 1 value of advantages." in replay.log
    replay.end()


def test_too_many_in_a_row_end_the_run_with_the_dumps_path(folder):
    run, code = finished(folder, "2 3", "--policy.max_nonfinite_steps", "2")
    assert code == 1
    assert "2 optimizer steps in a row were not finite" in run.log
    assert f"rlsys replay {run.out.dumps.resolve() / 'step-3'}" in run.log.replace("\n", "")


def test_weights_that_are_not_finite_are_neither_sampled_with_nor_saved(folder):
    run, code = finished(folder, "", "--policy.lr", "1e39", "--checkpoint.save_steps", "1")
    assert code == 1
    assert "the weights of policy version 1 hold NaNs or infinities" in run.log
    assert not list(run.out.checkpoints.glob("step-*"))
    for saved in (run.out.interrupted, run.out.final):
        assert not saved.exists()


def test_supervised_training_keeps_the_last_good_checkpoint(starter_model, tmp_path):
    folder = tmp_path / "sft"
    write_sft_files(folder, starter_model)
    good = RunProcess(folder, "run.yaml", "--max_steps", "10", subcommand="sft")
    assert good.wait() == 0, good.log
    words = ("--max_steps", "20", "--policy.lr", "1e39", "--checkpoint.resume")
    run = RunProcess(folder, "run.yaml", *words, subcommand="sft")
    assert run.wait() == 1
    # The first step makes the weights infinite, and the next ones are not finite.
    assert "3 optimizer steps in a row were not finite" in run.log
    assert "Not finite: loss, gradient" in run.log
    assert "weights of rank 0" in run.log
    assert "not saved: " in run.log
    steps = [row["step"] for row in read_jsonl(run.out.metrics) if "policy_version" in row]
    assert steps == [*range(1, 11), 11, 12, 13]
    assert [folder.name for folder in run.out.checkpoints.glob("step-*")] == ["step-10"]
    again = RunProcess(
        folder, "run.yaml", "--max_steps", "11", "--checkpoint.resume", subcommand="sft"
    )
    assert again.wait() == 0, again.log
