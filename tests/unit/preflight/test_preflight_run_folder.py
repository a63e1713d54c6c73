"""Folders that a run may not write into."""

import os

import pytest
from config_cases import write_model, write_run, write_sft_run
from preflight_cases import only

from rlsys.config import Config, SftConfig
from rlsys.config.load import load_config, load_config_as, save_config
from rlsys.preflight.run_folder import output_dir_problems, plan_start
from rlsys.run.folder import ENDED, RUNNING, RunDir
from rlsys.run.manifest import write_manifest


@pytest.mark.parametrize(
    ("file", "content"),
    [("metrics.jsonl", "{}\n"), ("config.yaml", "max_steps: 1\n"), ("status", "running\n")],
)
def test_an_output_directory_with_another_run_says_how_to_go_on(problems, tmp_path, file, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text(content)
    text = only(problems())
    assert "holds another run, without a checkpoint: start from step 0 with --overwrite" in text
    assert "--output_dir" in text
    assert "--checkpoint.resume" not in text  # there is nothing to continue from
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    assert "--checkpoint.resume" in only(problems())
    assert problems("--overwrite") == []


@pytest.mark.parametrize("resume", [[], ["--checkpoint.resume"]])
@pytest.mark.parametrize("folder", ["interrupted", "final", "checkpoints/step-3"])
def test_a_run_does_not_move_aside_what_it_reads(problems, tmp_path, folder, resume):
    """Whoever starts from an interrupted run's weights is asked for --overwrite, and takes it."""
    model = tmp_path / "run" / folder
    model.parent.mkdir(parents=True, exist_ok=True)
    write_run(tmp_path)
    (tmp_path / "model").rename(model)
    found = problems("--model.path", str(model), "--overwrite", *resume)
    if resume and folder.startswith("checkpoints"):
        assert found == []  # nothing is moved
    else:
        assert f"overwrite: moves aside {model}, which this run reads" in only(found)
        assert "--output_dir" in only(found)


@pytest.mark.parametrize("holds", ["nothing", "a run without a checkpoint"])
def test_the_remedy_for_nothing_to_resume_works(problems, tmp_path, holds):
    """A run that was interrupted in its first step was refused whatever its user tried."""
    if holds != "nothing":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    text = only(problems("--checkpoint.resume"))
    assert ("leave checkpoint.resume out" in text) == (problems() == [])
    assert "add --overwrite" in text
    assert problems("--checkpoint.resume", "--overwrite") == []


@pytest.mark.parametrize("sft", [False, True])
def test_a_checkpoint_of_another_method_is_not_continued(tmp_path, sft):
    """Found before Ray starts, and not when its actors have loaded the model."""
    path = (write_sft_run if sft else write_run)(tmp_path)
    config = load_config_as(SftConfig if sft else Config, path, ["--checkpoint.resume"]).config
    write_model(tmp_path / "run/checkpoints/step-3")
    assert list(output_dir_problems(config)) == []
    other = "rollouts.json" if sft else "data.json"
    (tmp_path / "run/checkpoints/step-3" / other).write_text("{}")
    text = only(list(output_dir_problems(config)))
    assert f"not written by `rlsys {config.command}`" in text
    assert "set model.path to it" in text


def test_a_checkpoint_of_another_model_is_not_continued(problems, tmp_path):
    write_model(tmp_path / "run/checkpoints/step-3")
    assert problems("--checkpoint.resume") == []
    write_model(tmp_path / "run/checkpoints/step-4", hidden_size=128, num_hidden_layers=5)
    text = only(problems("--checkpoint.resume"))
    assert f"{tmp_path / 'run/checkpoints/step-4'} is of another model than model.path" in text
    assert "hidden_size 128, there 64; num_layers 5, there 4" in text
    assert problems("--overwrite") == []


def test_a_damaged_checkpoint_is_passed_over_before_the_run_too(problems, tmp_path):
    for step in (2, 3):
        folder = write_model(tmp_path / f"run/checkpoints/step-{step}")
        write_manifest(folder, step, {})
    (tmp_path / "run/checkpoints/step-3/tokenizer.json").unlink()
    config = load_config(write_run(tmp_path), ["--checkpoint.resume"]).config
    plan = plan_start(config)
    assert (plan.resume_step, plan.problem) == (2, None)
    assert plan.damaged == {3: "tokenizer.json is missing"}
    assert "step 3" in only(problems("--checkpoint.resume", "3"))
    (tmp_path / "run/checkpoints/step-2/config.json").unlink()
    text = only(problems("--checkpoint.resume"))
    assert "step 3: tokenizer.json is missing; step 2: config.json is missing" in text


def test_what_a_checkpoint_was_trained_with_cannot_change(problems, tmp_path):
    folder = write_model(tmp_path / "run/checkpoints/step-3")
    save_config(load_config(write_run(tmp_path)).config, folder / "run_config.yaml")
    assert problems("--checkpoint.resume", "--policy.lr", "1e-3") == []
    text = only(problems("--checkpoint.resume", "--policy.freeze_parameters_ratio", "0.5"))
    assert "policy.freeze_parameters_ratio 0.0 -> 0.5" in text


def test_a_run_that_failed_while_starting_can_be_started_again(problems, tmp_path):
    run = RunDir(tmp_path / "run")
    run.write_status(ENDED)
    run.metrics.touch()
    save_config(load_config(write_run(tmp_path)).config, run.config)
    assert problems() == []


def test_resuming_needs_a_checkpoint(problems, tmp_path):
    assert "no checkpoint" in only(problems("--checkpoint.resume"))
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert problems("--checkpoint.resume") == []


@pytest.mark.parametrize(
    ("step", "has_ended", "is_refused"),
    [(11, False, True), (10, True, True), (10, False, False), (9, True, False)],
)
def test_resuming_needs_steps_to_take(problems, tmp_path, step, has_ended, is_refused):
    """After the last step only the final model may be missing; it would be replaced otherwise."""
    (tmp_path / "run" / "checkpoints" / f"step-{step}").mkdir(parents=True)
    if has_ended:
        (tmp_path / "run" / "final").mkdir()
    found = problems("--checkpoint.resume")
    assert bool(found) == is_refused
    if is_refused:
        assert f"has step {step}" in only(found)
        assert "raise --max_steps" in only(found)


def test_an_output_directory_that_is_a_file(problems, tmp_path):
    (tmp_path / "run").touch()
    found = problems()
    assert only(found) == (
        f"output_dir: {tmp_path / 'run'} is not a folder: choose another one with --output_dir"
    )
    assert found[0].only_here


def test_an_output_directory_that_is_a_model(problems, tmp_path):
    write_model(tmp_path / "run")
    assert only(problems()) == (
        f"output_dir: {tmp_path / 'run'} holds a model (config.json), for which commands would "
        "take the run: choose another one with --output_dir"
    )


def test_an_output_directory_in_which_a_process_runs(problems, tmp_path):
    run = RunDir(tmp_path / "run")
    with run.held():
        run.write_status(RUNNING)
        assert f"another process is running in {run.path}. Wait" in only(problems())
        assert "another process is running" in only(problems("--overwrite"))
    assert "holds another run" in only(problems())


@pytest.mark.parametrize("place", ["file", "link"])
@pytest.mark.parametrize("option", [[], ["--checkpoint.resume"]])
def test_an_output_directory_below_something_else_than_a_folder(problems, tmp_path, place, option):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    found = problems("--output_dir", str(tmp_path / place / "a" / "b"), *option)
    assert only(found) == (
        f"output_dir: {tmp_path / place / 'a' / 'b'} cannot be made, {tmp_path / place} is not a "
        "folder: choose another one with --output_dir"
    )
    assert found[0].only_here


def test_an_output_directory_that_no_file_system_takes(problems, tmp_path):
    path = tmp_path / ("a" * 300) / "b"
    found = problems("--output_dir", str(path))
    assert only(found) == (
        f"output_dir: {path} cannot be made (File name too long): choose another one with "
        "--output_dir"
    )
    assert found[0].only_here


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_directory_without_the_permission_to_write(
    problems, tmp_path, monkeypatch, exists
):
    """Root may write anywhere, so the answer of the system is made up."""
    folder, closed = tmp_path / "closed" / "run", tmp_path / "closed"
    folder.mkdir(parents=True)
    if not exists:
        folder.rmdir()
    of_system = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode: of_system(path, mode) and closed not in (path, path.parent)
    )
    found = problems("--output_dir", str(folder))
    where = "is a folder that you may not write in:" if exists else f"you may not write in {closed}"
    assert where in only(found)
    assert found[0].only_here
