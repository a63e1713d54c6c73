"""Checkpoints that are written while the run goes on, that fail, and whose process is killed."""

import errno
import random
import subprocess
import sys
import threading
import time

import pytest

from rlsys.config import CheckpointConfig
from rlsys.problems import RunFailed
from rlsys.run import checkpoints as run_checkpoints
from rlsys.run.checkpoints import Checkpoints, Models
from rlsys.run.choice import choose_checkpoint
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps
from rlsys.run.manifest import checkpoint_problem


class Disk:
    """Files that come onto the disk when a test says so, and perhaps not at all."""

    def __init__(self):
        self.may_write = threading.Event()
        self.error = None
        self.size = 10

    def __call__(self, folder, step):
        def await_files():
            assert self.may_write.wait(60)
            if self.error is not None:
                raise self.error
            (folder / "weights").write_text(str(step) * self.size)
            return {}

        return await_files


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def checkpoints(tmp_path, disk):
    def build(expected_bytes=0, **fields):
        config = CheckpointConfig(**{"save_steps": 1, "save_total_limit": 2, **fields})
        return Checkpoints(
            RunDir(tmp_path),
            write=disk,
            config=config,
            last_step=200,
            models=Models(tmp_path / "hf", write=lambda folder: dict, config=config),
            expected_bytes=expected_bytes,
        )

    return build


def whole(tmp_path):
    folder = tmp_path / "checkpoints"
    steps = checkpoint_steps(folder)
    return [s for s in steps if checkpoint_problem(folder / f"step-{s}", read_all=True) is None]


def test_a_step_does_not_wait_for_the_disk_but_the_end_does(checkpoints, disk, tmp_path):
    checkpoints = checkpoints()
    checkpoints.after_step(1)
    assert whole(tmp_path) == []
    assert not checkpoints.finish(timeout_s=0.05)
    disk.may_write.set()
    assert checkpoints.finish()
    assert whole(tmp_path) == [1]


def test_without_async_save_a_step_waits(checkpoints, disk, tmp_path):
    disk.may_write.set()
    checkpoints(async_save=False).after_step(1)
    assert whole(tmp_path) == [1]


def test_one_checkpoint_is_written_at_a_time(checkpoints, disk, tmp_path):
    checkpoints = checkpoints()
    checkpoints.after_step(1)
    threading.Timer(0.2, disk.may_write.set).start()
    checkpoints.after_step(2)
    assert whole(tmp_path)[0] == 1
    checkpoints.finish()
    assert whole(tmp_path) == [1, 2]


def test_auto_skips_while_one_is_being_written(checkpoints, disk, tmp_path):
    checkpoints = checkpoints(save_steps="auto")
    for step in range(10, 31, 10):
        checkpoints.after_step(step)
    disk.may_write.set()
    checkpoints.finish()
    assert whole(tmp_path) == [10]


@pytest.mark.parametrize("async_save", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "step-2.partial/weights"),
        OSError(errno.EROFS, "Read-only file system"),
        RunFailed("traceback\npolicy rank 0 died in policy sums_of_files"),
    ],
)
def test_a_save_that_fails_costs_that_checkpoint_alone(
    checkpoints, disk, tmp_path, capsys, error, async_save
):
    """The run loses nothing that it has, and says what happened."""
    checkpoints = checkpoints(async_save=async_save, save_total_limit=1)
    disk.may_write.set()
    checkpoints.after_step(1)
    checkpoints.finish()
    disk.error = error
    checkpoints.after_step(2)
    checkpoints.finish()
    text = capsys.readouterr().out
    assert f"warning: the checkpoint of step 2 was not saved in {tmp_path / 'checkpoints'}" in text
    assert str(error).splitlines()[-1] in text
    assert ("free there" in text) == isinstance(error, OSError)
    assert f"the newest one is {tmp_path / 'checkpoints/step-1'}" in text
    assert checkpoints.failure in text
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    disk.error = None
    checkpoints.after_step(3)
    checkpoints.finish()
    assert whole(tmp_path) == [3]
    assert checkpoints.failure is None


def test_a_model_that_cannot_be_written_is_a_warning_too(tmp_path, capsys):
    def write(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = CheckpointConfig(save_hf_steps=1)
    Models(tmp_path / "hf", write=write, config=config).after_step(3)
    text = capsys.readouterr().out
    assert f"warning: the model of step 3 was not saved in {tmp_path / 'hf'}: [Errno 28]" in text
    assert "free there" in text
    assert list((tmp_path / "hf").iterdir()) == []


def test_who_waits_for_a_save_is_answered(checkpoints, disk):
    checkpoints = checkpoints()
    with pytest.raises(RunFailed, match="step 1 was not written in 0 s"):
        checkpoints.save(1, timeout_s=0.05)
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    disk.may_write.set()
    with pytest.raises(RunFailed, match=r"step 2 was not saved in .*No space left"):
        checkpoints.save(2)


@pytest.mark.parametrize("expected", [True, False])
def test_room_is_checked_before_anything_is_written(
    checkpoints, disk, tmp_path, capsys, monkeypatch, expected
):
    """By the size of the checkpoint before, or by what the run expects."""
    disk.may_write.set()
    disk.size = 2**20
    checkpoints = checkpoints(expected_bytes=2**40 if expected else 0)
    if not expected:
        checkpoints.after_step(1)
        checkpoints.finish()
    monkeypatch.setattr(run_checkpoints, "free_bytes", lambda folder: 2**19)
    checkpoints.after_step(2)
    text = capsys.readouterr().out
    needed = "1,024.0 GiB" if expected else "1.0 MiB"
    assert f"it takes {needed}, and the disk has 0.5 MiB free" in text
    assert whole(tmp_path) == ([] if expected else [1])


def test_what_the_next_one_replaces_makes_room_for_it(checkpoints, disk, tmp_path, monkeypatch):
    disk.may_write.set()
    checkpoints = checkpoints()
    for step in (1, 2):
        checkpoints.after_step(step)
        checkpoints.finish()
    room = lambda folder: 0 if (folder / "step-1").exists() else 2**30  # noqa: E731
    monkeypatch.setattr(run_checkpoints, "free_bytes", room)
    checkpoints.after_step(3)
    checkpoints.finish()
    assert whole(tmp_path) == [2, 3]


def test_every_nth_is_written_and_kept(checkpoints, disk, tmp_path):
    disk.may_write.set()
    checkpoints = checkpoints(save_steps=4, save_retain_interval=5, save_total_limit=1)
    for step in range(1, 13):
        checkpoints.after_step(step)
        checkpoints.finish()
    assert whole(tmp_path) == [5, 10, 12]


def test_the_config_of_its_time_is_in_a_checkpoint(checkpoints, disk, tmp_path):
    disk.may_write.set()
    (tmp_path / "config.yaml").write_text("max_steps: 1\n")
    checkpoints().save(1)
    assert (tmp_path / "checkpoints/step-1/run_config.yaml").read_text() == "max_steps: 1\n"


KILLED = """
import sys
from pathlib import Path

from rlsys.config import CheckpointConfig
from rlsys.run.checkpoints import Checkpoints, Models
from rlsys.run.choice import choose_checkpoint
from rlsys.run.folder import RunDir


def write(folder, step):
    def await_files():
        (folder / "optimizer").mkdir()
        for name in ("weights", "optimizer/moments", "rollouts.json"):
            (folder / name).write_text(str(step) * 100_000)
        return {}

    return await_files


run = RunDir(Path(sys.argv[1]))
config = CheckpointConfig(save_steps=1, save_total_limit=2)
models = Models(run.hf, write=lambda folder: dict, config=config)
checkpoints = Checkpoints(run, write=write, config=config, last_step=10**6, models=models)
print("ready", flush=True)
for step in range(int(sys.argv[2]) + 1, 10**6):
    checkpoints.after_step(step)
"""


@pytest.mark.processes
def test_whatever_a_kill_leaves_is_continued_from(tmp_path):
    """kill -9 at random points of saving, renaming and deleting; the next process goes on."""
    step, delays = 0, random.Random(0)
    for _ in range(12):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delays.uniform(0.01, 0.2))
            process.kill()
        run = RunDir(tmp_path)
        steps = checkpoint_steps(run.checkpoints)
        assert whole(tmp_path) == steps
        choice = choose_checkpoint(run, CheckpointConfig(resume=True), read_all=True)
        assert choice.step == max(steps, default=None)
        assert choice.step is None or choice.step >= step
        step = choice.step or step
    assert step > 12
