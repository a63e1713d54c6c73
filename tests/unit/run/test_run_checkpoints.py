"""A checkpoint that is there is whole, whenever the process was killed."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config import CheckpointConfig
from rlsys.model.weight_files import MANIFEST_FILE
from rlsys.run import checkpoints as run_checkpoints
from rlsys.run.checkpoints import Checkpoints, Models
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps
from rlsys.run.manifest import checkpoint_problem

FILES = ("weights", "optimizer", "schedule")


class Writer:
    """Writes a few files, or is interrupted after the first."""

    version = 0
    interrupted = False
    clock = seconds = 0.0

    def __call__(self, folder, step):
        assert list(folder.iterdir()) == []
        assert step == self.version
        self.clock += self.seconds
        for name in FILES:
            (folder / name).write_text(str(self.version))
            if self.interrupted:
                raise KeyboardInterrupt
        return dict

    def model(self, folder):
        (folder / "weights").write_text(str(self.version))
        return dict


@pytest.fixture
def writer():
    return Writer()


@pytest.fixture
def save(tmp_path, writer):
    def save(
        *steps,
        save_steps=1,
        save_total_limit=2,
        last_step=200,
        seconds=(0.0, 0.0),
        **models,
    ):
        config = CheckpointConfig(
            save_steps=save_steps,
            save_total_limit=save_total_limit,
            async_save=False,
            **models,
        )
        checkpoints = Checkpoints(
            RunDir(tmp_path / "run"),
            write=writer,
            config=config,
            last_step=last_step,
            models=Models(tmp_path / "run" / "hf", write=writer.model, config=config),
            clock=lambda: writer.clock,
        )
        of_step, writer.seconds = seconds
        for step in steps:
            writer.version = step
            writer.clock += of_step
            checkpoints.after_step(step)
        checkpoints.finish()
        return tmp_path / "run" / "checkpoints"

    return save


def read(folder, step):
    """The files of a checkpoint that is whole."""
    checkpoint = folder / f"step-{step}"
    assert checkpoint_problem(checkpoint, read_all=True) is None
    return {p.name: p.read_text() for p in checkpoint.iterdir() if p.name != MANIFEST_FILE}


def test_null_saves_nothing(save):
    assert not save(1, 2, 3, save_steps=None).exists()


@given(max_steps=st.integers(1, 10_000))
def test_auto_loses_a_twentieth_of_the_steps_at_most(max_steps):
    interval = CheckpointConfig().interval(max_steps)
    assert 1 <= interval <= max(1, max_steps / 20)
    assert max_steps / interval < 40  # nor does it save twice as often as that takes


def test_auto_takes_a_tenth_of_the_time_at_most(save, writer):
    """A step takes 1 s and a checkpoint 5 s: the next is due 50 s later."""
    folder = save(*range(1, 200), save_steps="auto", save_total_limit=100, seconds=(1.0, 5.0))
    steps = checkpoint_steps(folder)
    assert steps[:2] == [10, 60]
    assert 5 * len(steps) <= 0.1 * (200 + 5 * len(steps))


def test_auto_saves_on_time_where_that_costs_nothing(save):
    folder = save(*range(1, 61), save_steps="auto", save_total_limit=100, last_step=60)
    assert checkpoint_steps(folder) == list(range(3, 61, 3))


def test_the_last_step_is_saved_whatever_its_number(save):
    assert checkpoint_steps(save(*range(1, 6), save_steps=2, last_step=5)) == [4, 5]


def test_checkpoints_at_the_interval_and_the_newest_few_are_kept(save):
    folder = save(*range(1, 13), save_steps=3, save_total_limit=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-9"]
    assert read(folder, 12) == dict.fromkeys(FILES, "12")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, []),
        ({"save_hf_steps": 4}, [4, 8, 12]),
        ({"save_hf_steps": 2, "save_hf_total_limit": 3}, [8, 10, 12]),
        ({"save_hf_steps": 20}, []),
    ],
)
def test_models_without_optimizer_are_kept_beside_checkpoints(save, options, steps):
    checkpoints = save(*range(1, 13), save_steps=None, **options)
    folder = checkpoints.parent / "hf"
    assert sorted(path.name for path in folder.glob("*")) == sorted(f"step-{s}" for s in steps)
    for step in steps:
        assert (folder / f"step-{step}" / "weights").read_text() == str(step)


def test_what_gets_the_name_of_a_checkpoint_is_on_the_disk_by_then(save, monkeypatch):
    """Or a file of it may be empty when the machine crashes."""
    on_disk = set()
    fsync = os.fsync

    def noted(descriptor):
        fsync(descriptor)
        on_disk.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    rename = Path.rename

    def checked(path, target):
        if target.name == "step-1":
            assert {p.stat().st_ino for p in (path, *path.iterdir())} <= on_disk
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", checked)
    assert read(save(1), 1)


def test_newest_is_by_number_not_by_name(save):
    assert checkpoint_steps(save(8, 9, 10, 11)) == [10, 11]


def test_a_checkpoint_that_could_not_be_written_leaves_nothing(save, writer):
    """On a full disk it would take the place of what is still to be saved."""
    folder = save(1, 2)
    writer.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        save(3)
    assert sorted(path.name for path in folder.iterdir()) == ["step-1", "step-2"]


def test_what_a_killed_process_was_writing_does_not_count(save):
    folder = save(1, 2)
    (folder / "step-9.partial").mkdir()
    assert checkpoint_steps(folder) == [1, 2]
    save(3)
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-3"]


def test_a_step_that_was_saved_before_the_resume_is_saved_again(save, writer):
    folder = save(1, 2, 3, save_total_limit=5)
    (folder / "step-3" / "weights").write_text("9")
    save(3, save_total_limit=5)
    assert read(folder, 3) == dict.fromkeys(FILES, "3")
    assert checkpoint_steps(folder) == [1, 2, 3]


@pytest.mark.parametrize("steps", [[3], [2]], ids=["oldest dropped", "same step again"])
def test_a_checkpoint_is_never_there_in_part(save, monkeypatch, steps):
    folder = save(1, 2)

    def killed_while_deleting(path, **_):
        if path.exists():
            next(path.iterdir()).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(run_checkpoints.shutil, "rmtree", killed_while_deleting)
    with pytest.raises(KeyboardInterrupt):
        save(*steps)
    monkeypatch.undo()
    left = checkpoint_steps(folder)
    assert left
    assert all(set(read(folder, step)) == set(FILES) for step in left)
    save(4)
    assert [path.name for path in folder.iterdir() if path.name.endswith(".partial")] == []


def test_other_folders_are_no_checkpoints(tmp_path):
    for name in ("step-3", "step-4.partial", "step-x", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-5").write_text("a file")
    assert checkpoint_steps(tmp_path) == [3]
    shutil.rmtree(tmp_path)
    assert checkpoint_steps(tmp_path) == []
