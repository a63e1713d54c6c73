import json
import os
import re

import pytest
from tracking_cases import make_config

from rlsys.cli import main
from rlsys.config.load import save_config
from rlsys.files import JsonlWriter
from rlsys.run.folder import RUNNING, RunDir


def write_run(path, *, steps: int, end: int | None = None) -> None:
    run = RunDir(path)
    run.path.mkdir(parents=True)
    save_config(make_config(run.path), run.config)
    with run.held():
        run.write_status(RUNNING)
    writer = JsonlWriter(run.metrics)
    for step in range(1, steps + 1):
        writer.append({"step": step, "time/step": 100.0, "global_step/max_steps": f"{step}/60"})
        writer.append({"step": step, "eval/reward": step / 10})
    os.utime(run.metrics, (steps, steps))
    if end is not None:
        run.record_end(end, "why")


def test_runs_stand_below_each_other_the_newest_last(tmp_path, capsys):
    write_run(tmp_path / "b", steps=2, end=0)
    write_run(tmp_path / "a", steps=3, end=1)
    write_run(tmp_path / "c", steps=40)
    (tmp_path / "model").mkdir()
    assert not main(["runs", str(tmp_path)])
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["run", "method", "status", "step", "best held-out", "time", "updated"]
    assert [line[:6] for line in lines[1:]] == [
        [f"{tmp_path}/b", "grpo", "ended", "2/60", "eval/reward 0.2 at 2", "3m 20s"],
        [f"{tmp_path}/a", "grpo", "ended, exit code 1", "3/60", "eval/reward 0.3 at 3", "5m 0s"],
        [f"{tmp_path}/c", "grpo", "killed", "40/60", "eval/reward 4 at 40", "1h 6m 40s"],
    ]


def test_json_has_one_object_a_run(tmp_path, capsys):
    write_run(tmp_path / "a", steps=1)
    assert not main(["runs", str(tmp_path / "a"), "--format", "json"])
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["best_eval"] == {"metric": "eval/reward", "value": 0.1, "step": 1}
    assert (row["state"], row["step"], row["steps"]) == ("killed", 1, 60)


@pytest.mark.parametrize(
    ("name", "problem"), [("", "holds no runs: name the folder"), ("nowhere", "is not a folder")]
)
def test_a_folder_without_runs_is_an_error(tmp_path, capsys, name, problem):
    assert main(["runs", str(tmp_path / name)])
    assert problem in capsys.readouterr().err
