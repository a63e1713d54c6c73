"""Logs of actors: a file for each, rotated, without secrets; a full disk stops nothing."""

import pytest

from rlsys import log_files
from rlsys.actors.logs import kept_logs
from rlsys.log_files import LogFile
from rlsys.log_files import log_files as files_of
from rlsys.rotation import older_parts


@pytest.fixture
def take(tmp_path, monkeypatch):
    """What Ray does with a batch of lines."""
    from rlsys.actors import logs

    monkeypatch.setenv("MY_API_KEY", "sk-of-the-environment")
    said = []
    with kept_logs(tmp_path / "logs", ["of the config"], said.append):
        dispatcher = logs.global_worker_stdstream_dispatcher

        def emit(actor_name, *lines, pid=7):
            ours = [handle for name, handle in dispatcher.handlers if name == "rlsys logs"]
            (handle,) = ours
            handle({"actor_name": actor_name, "lines": list(lines), "ip": "10.0.0.1", "pid": pid})

        emit.said, emit.folder = said, tmp_path / "logs"
        yield emit
    assert "rlsys logs" not in [name for name, _ in dispatcher.handlers]


def texts(path):
    """The lines without their times."""
    return [line[20:] for line in path.read_text().splitlines()]


def test_each_actor_has_its_file_with_the_process_that_printed(take):
    take("policy-0", "a", "b")
    take("policy-0-1", "after a restart", pid=8)
    take("rollout-11", "c")
    take("rollout-2", "d")
    take(None, "of Ray")
    take(None, "Autoscaler status", pid="autoscaler")
    assert list(files_of(take.folder)) == ["other-0", "policy-0", "rollout-2", "rollout-11"]
    assert texts(take.folder / "policy-0.log") == [
        "--- process 7 on 10.0.0.1",
        *("a", "b"),
        "--- process 8 on 10.0.0.1",
        "after a restart",
    ]
    assert texts(take.folder / "other-0.log")[1:] == ["of Ray"]
    assert (take.folder / "policy-0.log").stat().st_mode & 0o077 == 0


def test_secrets_are_left_out(take):
    take("policy-0", "key sk-of-the-environment", "this is of the config", "http://me:pw@host/x")
    assert texts(take.folder / "policy-0.log")[1:] == [
        "key ***",
        "this is ***",
        "http://***@host/x",
    ]


def test_a_disk_that_is_full_is_said_once(take, monkeypatch):
    def full(self, lines):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LogFile, "write", full)
        take("policy-0", "a")
        take("policy-0", "b")
    take("policy-0", "c")
    assert texts(take.folder / "policy-0.log") == ["c"]
    assert len(take.said) == 1
    assert "No space left" in take.said[0]


def test_a_log_is_rotated_and_old_parts_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(log_files, "MOST_BYTES", 200)
    file = LogFile(tmp_path / "policy-0.log")
    for number in range(100):
        file.write([f"line {number}"])
    file.close()
    parts = older_parts(tmp_path / "policy-0.log")
    assert len(parts) == log_files.OLDER_PARTS
    kept = [text for part in [*parts, tmp_path / "policy-0.log"] for text in texts(part)]
    first = 100 - len(kept)
    assert kept == [f"line {number}" for number in range(first, 100)]
    assert all(part.stat().st_size < 240 for part in parts)
    assert list(files_of(tmp_path)) == ["policy-0"], "older parts are not actors"
