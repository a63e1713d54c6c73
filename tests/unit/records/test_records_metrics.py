import json
import math

import numpy as np

from rlsys.files import JsonlWriter, truncate_after
from rlsys.records.metrics import Metrics


def test_a_step_and_its_evaluation_are_one_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    assert metrics.names() == []
    assert len(metrics.table().steps) == 0
    writer = JsonlWriter(path)
    writer.append({"step": 0, "eval/reward": 0.5})
    writer.append({"step": 1, "reward": 1.0, "remaining_time": "3 s", "kl": None})
    writer.append({"step": 2, "reward": 2.0, "new": 7})
    assert metrics.names() == ["eval/reward", "kl", "new", "reward"]
    writer.append({"step": 2, "eval/reward": 0.75})
    table = metrics.table()
    assert table.steps.tolist() == [0, 1, 2]
    assert {name: list(map(str, column)) for name, column in table.columns.items()} == {
        "eval/reward": ["0.5", "nan", "0.75"],
        "kl": ["nan", "nan", "nan"],
        "new": ["nan", "nan", "7.0"],
        "reward": ["nan", "1.0", "2.0"],
    }
    assert metrics.texts() == {"remaining_time": "3 s"}


def test_later_steps_alone_and_names_that_a_run_lacks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 2}) + "\n" for s in (1, 3, 2)))
    table = Metrics(path).table(["loss", "unknown"], after_step=1)
    assert table.steps.tolist() == [2, 3]
    assert table.columns["loss"].tolist() == [1.0, 1.5]
    assert np.isnan(table.columns["unknown"]).all()


def test_a_torn_last_line_and_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 1}\n[]\n{"a": 3}\n{"step": "x"}\n\xff\n{"step": 2, "a"')
    metrics = Metrics(path)
    assert metrics.table().steps.tolist() == [1]
    with path.open("ab") as file:
        file.write(b': 5, "inside": {"b": 1}, "flag": true}\n')
    table = metrics.table()
    assert table.columns["a"].tolist() == [1.0, 5.0]
    assert set(table.columns) == {"a", "flag"}


def test_steps_that_a_resumed_run_takes_again_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    metrics = Metrics(path)
    for step in (1, 2, 3):
        writer.append({"step": step, "only early" if step == 3 else "loss": step})
    assert metrics.table().steps.tolist() == [1, 2, 3]
    truncate_after(path, 1)
    assert metrics.table().steps.tolist() == [1]
    JsonlWriter(path).append({"step": 2, "loss": 9.0})
    table = metrics.table()
    assert table.columns["loss"].tolist() == [1.0, 9.0]
    assert "only early" not in table.columns
    path.unlink()
    assert metrics.table().steps.tolist() == []


def test_a_metric_that_was_logged_twice_has_its_later_value(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 1, "a": null}\n')
    assert math.isnan(Metrics(path).table().columns["a"][0])
