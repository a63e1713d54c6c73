"""What a run that continues says before it replaces anything."""

from pathlib import Path

import pytest
from config_cases import write_config

from rlsys.config.load import load_config, save_config
from rlsys.config.roles import decide_cpu_threads
from rlsys.run.folder import RUNNING, RunDir
from rlsys.run.kept import checkpoint_steps
from rlsys.run.resume import (
    holds_run,
    move_aside,
    refused_change,
    resume_notes,
    set_aside_later,
    with_threads_of,
)


def notes(folder, *overrides, rows=(), step=4):
    """The notes of a run in `folder` whose rows of metrics.jsonl have these steps."""
    path = write_config(folder)
    run = RunDir(folder / "run")
    run.path.mkdir()
    save_config(load_config(path).config, run.config)
    run.metrics.write_text("".join(f'{{"step": {row}}}\n' for row in rows))
    options = ["--checkpoint.resume", "--output_dir", "elsewhere", *overrides]
    return list(resume_notes(load_config(path, options).config, run, step))


def test_an_unchanged_run_that_lost_nothing_has_one_line(tmp_path):
    (line,) = notes(tmp_path, rows=[1, 2, 3, 4])
    assert line == f"continuing from {tmp_path}/run/checkpoints/step-4"


def test_steps_that_are_taken_again_are_named(tmp_path):
    _, line = notes(tmp_path, rows=range(8))
    assert line.startswith("steps 5 to 7 came after that checkpoint")


def test_settings_that_differ_are_named_with_both_values(tmp_path):
    _, line = notes(tmp_path, "--policy.lr", "1e-9", "--seed", "7")
    assert line == "changed since then: seed 42 -> 7; policy.lr 1e-06 -> 1e-09"


@pytest.mark.parametrize(("options", "threads"), [((), 6), (("--policy.cpu_threads", "3"), 3)])
def test_a_resumed_run_computes_with_as_many_threads_as_before(tmp_path, options, threads):
    path, run = write_config(tmp_path), RunDir(tmp_path / "run")
    run.path.mkdir()
    config = load_config(path, options).config
    assert with_threads_of(config, run, 4) is config  # there is no earlier run
    save_config(decide_cpu_threads(load_config(path).config, device="cpu", cores=6), run.config)
    kept = with_threads_of(config, run, 4)
    assert kept.policy.cpu_threads == threads
    assert decide_cpu_threads(kept, device="cpu", cores=2) is kept


def test_a_config_of_an_older_version_or_of_a_user_is_not_an_error(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    config = load_config(write_config(tmp_path)).config
    assert len(list(resume_notes(config, run, 1))) == 1
    run.config.write_text("max_steps: [\n")
    assert len(list(resume_notes(config, run, 1))) == 1
    save_config(config, run.config)
    text = run.config.read_text()
    run.config.write_text(text.replace("  lr: ", "  rate: ").replace("policy:", "policies:"))
    assert len(list(resume_notes(config, run, 1))) == 1


def test_a_run_that_is_replaced_is_moved_aside_as_a_whole_each_time(tmp_path):
    run = RunDir(tmp_path)
    assert list(move_aside(run)) == []
    (tmp_path / "notes.txt").write_text("of the user")
    for number in (1, 2):
        for path in run.files:
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{path.name} {number}")
        (note,) = move_aside(run)
        assert str(tmp_path / f"replaced-{number}") in note
        assert not holds_run(run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "replaced-1", "replaced-2"]
    for number in (1, 2):
        left = {p.name: p.read_text() for p in (tmp_path / f"replaced-{number}").iterdir()}
        assert left == {path.name: f"{path.name} {number}" for path in run.files}


def test_a_killed_run_that_is_moved_aside_is_not_waited_for(tmp_path):
    run = RunDir(tmp_path)
    with run.held():
        run.write_status(RUNNING)
        assert list(move_aside(run))
        assert RunDir(tmp_path / "replaced-1").state() == "ended"


def test_every_file_of_a_run_is_among_its_files():
    run = RunDir(Path("run"))
    paths = {p for p in vars(run).values() if isinstance(p, Path)} - {run.path}
    assert all(run.holds(path) for path in paths if not path.name.startswith("."))


def resumed(folder, *overrides, step=4):
    """(config, run, checkpoint) of a run that goes on with these options."""
    path = write_config(folder)
    run = RunDir(folder / "run")
    checkpoint = run.checkpoints / f"step-{step}"
    checkpoint.mkdir(parents=True)
    options = ["--checkpoint.resume", *overrides]
    save_config(load_config(path).config, checkpoint / "run_config.yaml")
    return load_config(path, options).config, run, checkpoint


def test_changes_are_those_since_the_checkpoint_and_not_since_the_last_resume(tmp_path):
    config, run, _ = resumed(tmp_path, "--policy.lr", "1e-9")
    save_config(config, run.config)
    assert "changed since then: policy.lr 1e-06 -> 1e-09" in list(resume_notes(config, run, 4))


def test_changes_beside_the_training_are_listed_as_safe(tmp_path):
    options = ["--checkpoint.save_total_limit", "5", "--policy.lr", "1e-9"]
    config, run, checkpoint = resumed(tmp_path, *options)
    _, trained, beside = resume_notes(config, run, 4)
    assert "lr" in trained
    assert "save_total_limit" not in trained
    assert "safe" in beside
    assert "checkpoint.save_total_limit 2 -> 5" in beside
    assert "lr" not in beside
    assert refused_change(config, run, checkpoint) is None


@pytest.mark.parametrize(
    "options",
    [
        ["--policy.freeze_parameters", "model.layers.0."],
        ["--policy.freeze_parameters_ratio", "0.5"],
        ["--policy.lora.rank", "4"],
    ],
)
def test_a_change_of_what_is_trained_is_refused(tmp_path, options):
    config, run, checkpoint = resumed(tmp_path, *options)
    text = refused_change(config, run, checkpoint)
    assert f"since {checkpoint}" in text
    assert options[0].removeprefix("--").rpartition(".")[0] in text
    assert "set it back" in text


def test_damaged_checkpoints_are_named_first(tmp_path):
    config, run, _ = resumed(tmp_path)
    first, second = resume_notes(config, run, 4, {6: "model.safetensors is missing"})
    assert first.startswith("warning: the checkpoint of step 6 cannot be continued from: model.saf")
    assert "continuing from" in second


def test_later_checkpoints_are_moved_aside(tmp_path):
    """Else the next resume would take them for the newest, and saving would drop the new ones."""
    run = RunDir(tmp_path)
    for step in (2, 4, 6):
        (run.checkpoints / f"step-{step}").mkdir(parents=True)
    assert list(set_aside_later(run, 6)) == []
    (note,) = set_aside_later(run, 2)
    assert "later steps 4, 6" in note
    assert checkpoint_steps(run.checkpoints) == [2]
    assert checkpoint_steps(tmp_path / "replaced-1/checkpoints") == [4, 6]
