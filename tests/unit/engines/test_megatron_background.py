"""Files that a thread of a rank writes: what is known of them when, and why a write failed."""

import errno
import hashlib
import threading

import pytest
import torch.distributed as dist
from waiting import eventually

from rlsys.engines.megatron import background
from rlsys.engines.megatron.background import BackgroundWriter, popped, write_now


@pytest.fixture(autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Files:
    """One file, and an index of what was written."""

    def __init__(self, folder, write):
        self.folder, self.write = folder, write

    def names(self):
        return []

    def conclude(self, written):
        (self.folder / "index").write_text(str(len(written)))


def sums(writer, folder):
    return eventually(lambda: writer.sums(folder), "sums of the files")


def test_sums_are_there_when_all_files_are(tmp_path):
    writer, may_write = BackgroundWriter(60), threading.Event()

    def write():
        assert may_write.wait(60)
        (tmp_path / "weights").write_text("w")

    writer.start(tmp_path, Files(tmp_path, write), in_background=True)
    assert writer.sums(tmp_path) is None
    may_write.set()
    found = sums(writer, tmp_path)
    assert sorted(found) == ["index", "weights"]
    assert found["weights"].sha256 == hashlib.sha256(b"w").hexdigest()


def test_a_folder_is_asked_for_when_the_next_one_is_being_written(tmp_path):
    writer, may_write = BackgroundWriter(60), threading.Event()
    for name, wait in (("one", lambda: None), ("two", may_write.wait)):
        (tmp_path / name).mkdir()
        files = Files(tmp_path / name, wait)
        writer.start(tmp_path / name, files, in_background=True)
    assert sorted(writer.sums(tmp_path / "one")) == ["index"]
    assert writer.sums(tmp_path / "two") is None
    may_write.set()
    assert sorted(sums(writer, tmp_path / "two")) == ["index"]


def test_in_the_foreground_all_is_written_at_once(tmp_path):
    writer = BackgroundWriter(60)
    write = (tmp_path / "weights").touch
    writer.start(tmp_path, Files(tmp_path, write), in_background=False)
    assert sorted(writer.sums(tmp_path)) == ["index", "weights"]


@pytest.mark.parametrize(
    ("error", "of_system", "says"),
    [
        (OSError(errno.EROFS, "Read-only file system"), None, "Read-only file system"),
        (RuntimeError("unexpected pos 64 vs 0"), "No space left on device", "No space left"),
        (RuntimeError("a bug"), None, "RuntimeError: a bug"),
    ],
)
def test_the_reason_is_what_the_system_says(tmp_path, monkeypatch, error, of_system, says):
    """torch says "unexpected pos" where a disk is full."""

    def check_writable(folder):
        if of_system is not None:
            raise OSError(errno.ENOSPC, of_system)

    def write():
        raise error

    monkeypatch.setattr(background, "check_writable", check_writable)
    writer = BackgroundWriter(60)
    writer.start(tmp_path, Files(tmp_path, write), in_background=True)
    with pytest.raises(OSError, match=says):
        sums(writer, tmp_path)
    assert not (tmp_path / "index").exists()
    writer.start(tmp_path, Files(tmp_path, lambda: None), in_background=True)
    assert sorted(sums(writer, tmp_path)) == ["index"]


def test_a_process_that_took_the_place_of_another_has_no_files(tmp_path):
    """Else an unfinished folder would pass for a checkpoint."""
    with pytest.raises(OSError, match="has been replaced"):
        BackgroundWriter(60).sums(tmp_path)


def test_a_disk_that_is_full_leaves_no_rank_in_a_collective():
    """What is exported together is exported to the end."""
    taken = []

    def tensors():
        for number in range(5):
            taken.append(number)
            yield str(number), None

    def write(tensors):
        next(tensors)
        raise OSError(errno.ENOSPC, "No space left on device")

    fail = write_now(tensors(), write)
    assert taken == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="No space left"):
        fail()
    assert write_now(tensors(), list)() is None


def test_tensors_leave_as_they_are_written():
    tensors = [(name, None) for name in "abc"]
    left = [(name, len(tensors)) for name, _ in popped(tensors)]
    assert left == [("a", 2), ("b", 1), ("c", 0)]
