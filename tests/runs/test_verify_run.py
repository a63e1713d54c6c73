"""A real run verifies; its own warning can end it, with a checkpoint to go on from."""

import json

import pytest
from run_cases import RunProcess, write_run_files

from rlsys.cli import main
from rlsys.exit_codes import UNHEALTHY
from rlsys.files import read_jsonl
from rlsys.run.kept import checkpoint_steps

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def folder(starter_model, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write_run_files(folder, starter_model)
    monkeypatch.chdir(folder)  # where the relative paths of the config start
    return folder


def test_a_run_that_its_warning_ended_goes_on_and_verifies(folder, capsys):
    """Clipped completions are certain: an untrained model writes to the last token."""
    words = ["run.yaml", "--max_steps", "7", "--tracking.health.clipped_completions", "0.01"]
    first = RunProcess(folder, *words, "--tracking.stop_on", "clipped_completions")
    try:
        assert first.wait() == UNHEALTHY, first.log
    finally:
        first.end()
    assert "tracking.stop_on names clipped_completions, so the run ends" in first.log
    [warning] = read_jsonl(first.out.warnings)
    assert (warning["warning"], warning["step"]) == ("clipped_completions", 5)
    assert first.out.read_end()[0] == UNHEALTHY
    assert checkpoint_steps(first.out.checkpoints)[-1] == 5
    second = RunProcess(folder, *words, "--checkpoint.resume")
    try:
        assert second.wait() == 0, second.log
    finally:
        second.end()
    assert len(list(read_jsonl(second.out.warnings))) == 1
    assert main(["verify", "out", "--sample", "all"]) == 0, capsys.readouterr().out
    out = " ".join(capsys.readouterr().out.split())
    assert "again by digits, format" in out
    assert "ok plugin files 1 of 1" in out
    assert "ok steps 7 follow each other" in out
    rows = [json.loads(line) for line in second.out.completions.read_text().splitlines()]
    rows[20]["rewards"]["digits"] += 0.01
    rows[20]["reward"] = rows[20]["rewards"]["digits"] + rows[20]["rewards"]["format"]
    second.out.completions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["verify", "out"]) == 1
    assert "DIFFERENT completions.jsonl, line " in " ".join(capsys.readouterr().out.split())
