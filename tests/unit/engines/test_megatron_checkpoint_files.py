"""A checkpoint from a stranger: what torch would run when it unpickles the index is refused."""

import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from rlsys.engines.megatron.mcore_files import check_index


class Runs:
    def __init__(self, function, argument):
        self.parts = function, (argument,)

    def __reduce__(self):
        return self.parts


@pytest.fixture
def folder(tmp_path):
    state = {"weight": torch.arange(6.0).reshape(2, 3), "step": 3, "text": "a"}
    save(state, storage_writer=FileSystemWriter(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved"


def test_the_index_that_torch_writes_is_read(folder):
    check_index(folder)


@pytest.mark.parametrize(
    ("function", "argument"),
    [(os.mkdir, "ran"), (eval, "__import__('os').mkdir('ran')"),
     (exec, "import os; os.mkdir('ran')"), (torch.load, "ran")],
    ids=["os.mkdir", "eval", "exec", "torch.load"],
)  # fmt: skip
def test_an_index_that_runs_something_is_refused_and_runs_nothing(
    folder, tmp_path, monkeypatch, function, argument
):
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(function, argument)))
    with pytest.raises(ValueError, match=r"\.metadata is damaged, or is not torch's: it names"):
        check_index(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 100])
def test_an_index_that_is_cut_off_is_refused(folder, keep):
    file = folder / ".metadata"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        check_index(folder)
