import json

import pytest

from rlsys.data.jsonl import write_jsonl


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "data" / "train.jsonl"

    def rows():
        yield {"prompt": "é"}
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        write_jsonl(path, rows())
    assert list(path.parent.iterdir()) == []
    assert write_jsonl(path, [{"prompt": "é"}, {"prompt": "b"}]) == 2
    assert [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()] == [
        "é",
        "b",
    ]
    assert list(path.parent.iterdir()) == [path]
