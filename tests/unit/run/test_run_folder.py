"""One run at a time in a folder, whatever becomes of its process."""

import errno
import fcntl
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from rlsys.interrupts import Stopped
from rlsys.problems import RunFailed
from rlsys.run import folder
from rlsys.run.folder import ENDED, RUNNING, RunDir

HOLDER = """
import sys, time
from pathlib import Path
from rlsys.run.folder import RunDir
with RunDir(Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_that_another_process_holds_is_refused_until_that_is_dead(holder, tmp_path):
    run = RunDir(tmp_path / "run")
    message = rf"another process is running in {run.path}\..*--output_dir"
    with pytest.raises(ValueError, match=message), run.held():
        pass
    holder.kill()
    holder.wait()
    with run.held():
        pass


def test_a_folder_can_be_held_again_after_a_failure(tmp_path):
    run = RunDir(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run.held():
        raise ZeroDivisionError
    with run.held():
        assert run.path.is_dir()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    """What the permissions do not show: here a name that no file system takes."""
    path = tmp_path / ("a" * 300)
    with pytest.raises(ValueError, match=r"File name too long.*--output_dir"), RunDir(path).held():
        pass


def test_a_file_system_without_locks_is_noted_and_used(tmp_path, monkeypatch, capsys):
    def lock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", lock)
    with RunDir(tmp_path / "run").held():
        pass
    assert "has no locks" in capsys.readouterr().out


def test_other_failures_of_a_lock_are_not_hidden(tmp_path, monkeypatch):
    def lock(file, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(OSError, match="Input/output"), RunDir(tmp_path / "run").held():
        pass


def test_the_state_of_a_folder_is_that_of_its_last_run(holder, tmp_path):
    run = RunDir(tmp_path / "run")
    assert RunDir(tmp_path / "elsewhere").state() is None
    assert run.state() == "starting"
    run.write_status(ENDED)  # by an earlier attempt
    assert run.state() == "starting"
    run.write_status(RUNNING)
    assert run.state() == "running"
    holder.kill()
    holder.wait()
    assert run.state() == "killed"
    run.write_status(ENDED)
    assert run.state() == "ended"


def test_a_lock_of_another_host_proves_nothing(tmp_path):
    """Some network file systems show locks only on the host that took them."""
    run = RunDir(tmp_path)
    run.write_status(RUNNING)
    (tmp_path / ".lock").write_text("another-host")
    assert run.state() == "running"


def test_looking_at_the_state_keeps_no_run_out(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(
            "rlsys.run.folder.time.sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN)
        )
        with run.held():
            assert run.is_held()


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (None, (0, "done")),
        (
            RunFailed("a traceback\npolicy rank 0 died in policy update"),
            (1, "policy rank 0 died in"),
        ),
        (RunFailed("x\nrank 0 failed: OSError(28, 'No space left on device')"), (74, "rank 0")),
        (OSError(errno.ENOSPC, "No space left on device"), (74, "[Errno 28] No space")),
        (Stopped(signal.SIGUSR1), (75, "preempted by SIGUSR1")),
        (KeyError("x"), (1, "'x'")),
    ],
)
def test_an_end_leaves_its_exit_code_and_reason(tmp_path, error, end):
    run = RunDir(tmp_path / "run")
    run.write_status(RUNNING)
    assert run.read_end() is None
    with suppress(BaseException), run.recording_end():
        if error is not None:
            raise error
    code, why = run.read_end()
    assert (code, why[: len(end[1])]) == end
    assert run.has_ended()
    run.write_status(RUNNING)  # the next run in this folder
    assert run.read_end() is None


def test_a_full_disk_does_not_leave_a_run_running(tmp_path, monkeypatch):
    """The status gets its word in place: there is no room for another file."""
    run = RunDir(tmp_path / "run")
    run.write_status(RUNNING)

    def full(target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "replacing", full)
    with pytest.raises(OSError, match="No space"), run.recording_end():
        full(run.metrics)
    assert run.status.read_text() == "ended\n"
    assert run.state() == "ended"
