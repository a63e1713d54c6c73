"""A run continues from the newest checkpoint that is whole, and says what is wrong with others."""

import json
import re

import pytest

from rlsys.config import CheckpointConfig
from rlsys.run.best import write_best_model
from rlsys.run.choice import choose_checkpoint
from rlsys.run.folder import RunDir
from rlsys.run.kept import kept_steps
from rlsys.run.manifest import checkpoint_problem, write_manifest

FILES = {
    "config.json": "{}",
    "model.safetensors": "weights " * 50,
    "optimizer/common.pt": "learning rates " * 20,
    "optimizer/__0_0.distcp": "moments " * 50,
    "rollouts.json": json.dumps({"prompts": 3}),
}


def write_checkpoint(run, step, manifest=True):
    folder = run.checkpoints / f"step-{step}"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if manifest:
        write_manifest(folder, step, {})
    return folder


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    for step in (2, 4, 6):
        write_checkpoint(run, step)
    return run


def choose(run, resume=True, *, read_all=True, **fields):
    return choose_checkpoint(run, CheckpointConfig(resume=resume, **fields), read_all=read_all)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a truncated weight file": ("model.safetensors", cut, "model.safetensors has 393 bytes, and"),
    "a broken common.pt": ("optimizer/common.pt", cut, "common.pt has .* it is cut off"),
    "torn rollouts.json": ("rollouts.json", cut, "rollouts.json has .* it is cut off"),
    "a missing file": ("optimizer/__0_0.distcp", lambda path: path.unlink(), "distcp is missing"),
    "a flipped bit": ("model.safetensors", flip, r"other bytes than were written \(its SHA-256"),
    "an empty file": ("config.json", lambda path: path.write_text(""), "config.json has 0 bytes"),
    "a torn manifest": ("manifest.json", cut, "manifest.json cannot be read"),
    "a manifest of nonsense": (
        "manifest.json",
        lambda path: path.write_text('{"files": [1]}'),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_older_one_is_taken_by_itself(run, damage):
    name, harm, says = DAMAGE[damage]
    assert choose(run).step == 6
    harm(run.checkpoints / "step-6" / name)
    choice = choose(run)
    assert choice.step == 4
    assert choice.problem is None
    assert list(choice.damaged) == [6]
    assert re.search(says, choice.damaged[6])


def test_sizes_are_enough_before_the_run_and_bytes_when_it_starts(run):
    flip(run.checkpoints / "step-6/model.safetensors")
    assert choose(run, read_all=False).step == 6
    assert choose(run, read_all=True).step == 4


def test_where_none_is_whole_one_error_names_each(run):
    for step in (2, 4, 6):
        cut(run.checkpoints / f"step-{step}/rollouts.json")
    choice = choose(run)
    assert choice.step is None
    assert all(f"step {step}: rollouts.json has" in choice.problem for step in (2, 4, 6))
    assert "--overwrite" in choice.problem


def test_a_step_is_taken_or_refused_and_others_are_named(run):
    assert choose(run, 4).step == 4
    assert "has no checkpoint of step 5, it has 2, 4, 6" in choose(run, 5).problem
    cut(run.checkpoints / "step-4/model.safetensors")
    problem = choose(run, 4).problem
    assert "checkpoint of step 4" in problem
    assert "model.safetensors has" in problem
    assert "name another step, 2, 6" in problem


def metrics(run, **values):
    rows = [{"step": int(step[1:]), "eval/loss": value} for step, value in values.items()]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


BEST = {"metric_for_best_model": "eval_loss"}


def test_the_best_is_taken_and_then_the_second_best(run):
    metrics(run, s2=0.5, s3=0.1, s4=0.3, s6=0.4)
    assert choose(run, "best", **BEST).step == 4
    assert choose(run, "best", greater_is_better=True, **BEST).step == 2
    cut(run.checkpoints / "step-4/config.json")
    choice = choose(run, "best", **BEST)
    assert (choice.step, list(choice.damaged)) == (6, [4])


def test_a_metric_without_values_is_said(run):
    assert "no checkpoint" in choose(run, "best", **BEST).problem
    metrics(run, s3=0.1)
    problem = choose(run, "best", **BEST).problem
    assert "metric_for_best_model = eval_loss" in problem
    assert "2, 4, 6" in problem


@pytest.mark.parametrize(
    ("name", "greatest"),
    [
        ("eval/loss", False),
        ("eval_perplexity", False),
        ("eval/mae", False),
        ("reward", True),
        ("eval_reward", True),
    ],
)
def test_losses_and_errors_are_better_when_they_are_small(name, greatest):
    config = CheckpointConfig(metric_for_best_model=name)
    assert config.best_is_greatest == greatest
    assert config.best_metric.replace("/", "_") == name.replace("/", "_")


def test_checkpoints_of_an_older_rlsys_are_read_as_far_as_that_goes(tmp_path):
    run = RunDir(tmp_path / "run")
    folder = write_checkpoint(run, 2, manifest=False)
    (folder / "model.safetensors").unlink()
    (folder / "optimizer/common.pt").unlink()
    assert checkpoint_problem(folder, read_all=True) is None
    cut(folder / "rollouts.json")
    assert "rollouts.json is not JSON" in checkpoint_problem(folder, read_all=True)
    (folder / "rollouts.json").write_text("{}")
    (folder / "optimizer/common.pt").write_bytes(b"PK")
    assert "common.pt is cut off" in checkpoint_problem(folder, read_all=True)
    (folder / "optimizer/common.pt").unlink()
    (folder / "model.safetensors").write_bytes(b"\x10")
    assert "not a safetensors file" in checkpoint_problem(folder, read_all=True)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, {4, 6}),
        ({"save_retain_interval": 2}, {2, 4, 6}),
        ({"save_retain_interval": 3}, {4, 6}),
        (BEST, {2, 4, 6}),
        (BEST | {"greater_is_better": True}, {4, 6}),
    ],
)
def test_the_newest_the_best_and_every_nth_are_kept(run, fields, kept):
    metrics(run, s2=0.1, s4=0.4, s6=0.3)
    assert kept_steps(run, CheckpointConfig(**fields), 2) == kept


def test_the_last_whole_one_is_kept_whatever_happened_to_newer_ones(run):
    for step in (4, 6):
        cut(run.checkpoints / f"step-{step}/model.safetensors")
    assert 2 in kept_steps(run, CheckpointConfig(), 1)


def test_the_final_model_is_that_of_the_best_checkpoint(run, capsys):
    metrics(run, s2=0.1, s4=0.4)
    (run.checkpoints / "step-2/model.safetensors").write_text("best")
    write_manifest(run.checkpoints / "step-2", 2, {})
    assert write_best_model(run, CheckpointConfig(**BEST)) == 2
    assert {p.name for p in run.final.iterdir()} == {"config.json", "model.safetensors"}
    assert (run.final / "model.safetensors").read_text() == "best"
    flip(run.checkpoints / "step-2/model.safetensors")
    flip(run.checkpoints / "step-4/model.safetensors")
    assert write_best_model(run, CheckpointConfig(**BEST)) is None
    assert "the model of the last step is the final one" in capsys.readouterr().out
