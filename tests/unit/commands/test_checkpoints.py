"""`rlsys checkpoints`: what is listed of each checkpoint, and the exit code."""

import json

import pytest
from config_cases import write_config

from rlsys.cli import main
from rlsys.config.load import load_config, save_config
from rlsys.run.folder import RunDir
from rlsys.run.manifest import write_manifest


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    for step in (2, 4, 6):
        folder = run.checkpoints / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text("w" * 2**20)
        write_manifest(folder, step, {})
    run.metrics.write_text(
        "".join(json.dumps({"step": s, "reward": s % 5}) + "\n" for s in (2, 4, 6))
    )
    return run


def lines(run, capsys, *words):
    code = main(["checkpoints", str(run.path), *words])
    return code, capsys.readouterr().out.splitlines()


def test_every_checkpoint_is_a_line_and_the_newest_is_marked(run, capsys):
    code, (head, two, four, six, note) = lines(run, capsys)
    assert code == 0
    assert head.split() == ["step", "written", "size", "state"]
    assert all("1.0 MiB" in line and "good" in line for line in (two, four, six))
    assert "newest: --checkpoint.resume" in six
    assert "newest" not in four
    assert "--verify reads every byte" in note


def test_the_best_is_marked_by_the_metric_of_the_run_or_of_the_command(run, capsys, tmp_path):
    _, (head, _, four, six, _) = lines(run, capsys, "--metric", "reward")
    assert "reward" in head
    assert "best: --checkpoint.resume best" in four
    assert "best" not in six
    words = ["--checkpoint.metric_for_best_model", "reward"]
    words += ["--checkpoint.greater_is_better", "false", "--checkpoint.save_retain_interval", "2"]
    save_config(load_config(write_config(tmp_path), words).config, run.config)
    _, (_, two, four, six, _) = lines(run, capsys)
    assert "best" in six
    assert "best" not in four
    assert "kept for good" in two


def test_damage_is_said_and_is_exit_code_1(run, capsys):
    weights = run.checkpoints / "step-6/weights"
    weights.write_text("w" * (2**20 - 1) + "x")
    code, _ = lines(run, capsys)
    assert code == 0
    code, text = lines(run, capsys, "--verify")
    assert code == 1
    assert "newest" in text[2]
    assert "damaged: weights holds other bytes than were written" in " ".join(text)


def test_a_folder_without_checkpoints_is_an_error(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err
