"""The code of notebooks, run from top to bottom over runs as rlsys writes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tracking_cases import make_config, make_group

from rlsys.config.load import save_config
from rlsys.run.folder import RunDir
from rlsys.tracking import build_tracker

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples/notebooks").glob("*.ipynb"))


def write_run(path: Path, lr: float) -> None:
    path.mkdir(parents=True)
    config = make_config(path, policy={"lr": lr})
    save_config(config, RunDir(path).config)
    tracker = build_tracker(config)
    for step in range(1, 6):
        tracker.log_completions(step, make_group(["aa", "b" * step], [0.0, 1.0]), [-1.0, 1.0])
        tracker.log_metrics(step, {"reward": step * lr, "kl": 0.1, "time/step": 1.0})
        tracker.log_metrics(step, {"eval/reward": 0.5})
    tracker.close()


@pytest.mark.processes
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(tmp_path, notebook):
    write_run(tmp_path / "runs/a", 1e-5)
    write_run(tmp_path / "runs/b", 2e-5)
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    count = "\nprint('figures:', len(plt.get_fignums()))"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", "\n".join(code) + count],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "policy.lr: 1e-05 | 2e-05" in lines
    assert "b: the longest completions without reward" in lines
    assert "  step 1, 2 tokens: 'aa'" in lines
    assert lines[-1] == "figures: 2"
