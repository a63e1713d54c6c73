"""Each tracker with its real package, offline or local; what is not installed is skipped."""

import json
import math
import re
import sqlite3
import tomllib
from pathlib import Path

import pytest
from tracking_cases import make_config, make_group

from rlsys.run.folder import RunDir
from rlsys.tracking import build_tracker, trackers
from rlsys.tracking.mlflow import allowed_name
from rlsys.tracking.packages import REQUIREMENTS, missing_packages, version_of
from rlsys.tracking.tables import COLUMNS

ROOT = Path(__file__).parents[3]
METRICS = {"reward": 0.5, "kl": math.nan, "memory(GiB)": 1.5, "eval": "text", "time/step": 2.0}


def test_extras_of_pyproject_are_what_a_missing_tracker_asks_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {name: [wanted] for name, wanted in REQUIREMENTS.items()}.items() <= (
        extras["optional-dependencies"].items()
    )
    assert {*REQUIREMENTS, "tensorboard"} <= set(trackers)


def test_names_of_mlflow():
    names = ["pass@4", "memory(GiB)", "train_speed(iter/s)", "sampling/kl"]
    assert [*map(allowed_name, names)] == [
        "pass_at_4",
        "memory_GiB",
        "train_speed_iter/s",
        "sampling/kl",
    ]


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Runs a tracker through two steps in a thread, as a run does; returns the run's folder."""
    monkeypatch.chdir(tmp_path)

    def record(name, **settings):
        if version_of(name) is None:
            pytest.skip(f"NOT TESTED: {name} is not installed (pip install {REQUIREMENTS[name]})")
        assert missing_packages([name]) is None
        config = make_config(tmp_path / "run", tracking={"report_to": [name], **settings})
        tracker = build_tracker(config)
        for step in (9, 10):
            for group_id in (0, 1):
                group = make_group(["<b>hi", "ho"], [1.0, 0.0], group_id=group_id)
                tracker.log_completions(step, group, [0.7, -0.7])
            tracker.log_metrics(step, METRICS | {"reward": float(step)})
        tracker.log_warning(10, "the reward is constant")
        tracker.log_metrics(10, {"eval/reward": 0.25})
        tracker.close()
        return RunDir(tmp_path / "run")

    return record


@pytest.fixture
def silent(capsys):
    """Fails if the tracker did not work: its failures are notes."""
    yield
    assert "does not work" not in capsys.readouterr().out


@pytest.mark.slow
def test_wandb(recorded, silent):
    run = recorded("wandb", wandb_mode="offline", project="mine")
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    content = log.read_bytes()
    for text in (b"memory(GiB)", b"eval/reward", b"environment", b"generation_batch_size"):
        assert text in content
    tables = sorted(folder.glob("files/media/table/*.json"))
    rows = [json.loads(table.read_text()) for table in tables]
    assert [len(table["data"]) for table in rows] == [4, 4], "each step adds its own rows"
    assert rows[0]["columns"] == COLUMNS


@pytest.mark.slow
def test_mlflow(recorded, silent, tmp_path):
    recorded("mlflow", mlflow_tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", project="mine")
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        metrics = base.execute("select key, value, step from metrics order by step").fetchall()
        assert [row for row in metrics if row[0] == "reward"] == [
            ("reward", 9.0, 9),
            ("reward", 10.0, 10),
        ]
        assert ("memory_GiB", 1.5, 10) in metrics
        assert ("eval/reward", 0.25, 10) in metrics
        parameters = dict(base.execute("select key, value from params").fetchall())
        assert parameters["rollout.num_generations"] == "2"
        tags = dict(base.execute("select key, value from tags").fetchall())
        assert "packages.torch" in tags
        ((status, uri),) = base.execute("select status, artifact_uri from runs").fetchall()
    assert status == "FINISHED"
    table = json.loads((Path(uri) / "completions/step-000009.json").read_text())
    assert (table["columns"], len(table["data"])) == (COLUMNS, 4)
    assert "packages" in json.loads((Path(uri) / "environment.json").read_text())


@pytest.mark.slow
def test_trackio(recorded, silent, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    recorded("trackio", project="mine")
    (base,) = (tmp_path / "trackio").glob("mine*.db")
    with sqlite3.connect(base) as connection:
        logged = connection.execute("select step, metrics from metrics order by id").fetchall()
        values = {step: json.loads(metrics) for step, metrics in reversed(logged)}
        configs = str(connection.execute("select * from configs").fetchall())
    assert values[9]["reward"] == 9.0
    assert len(values[9]["completions"]["_value"]) == 4
    assert "num_generations" in configs
    assert "packages" in configs


@pytest.mark.slow
def test_swanlab(recorded, silent):
    run = recorded("swanlab", swanlab_mode="offline", project="mine")
    (folder,) = run.swanlab.glob("run-*")
    (log,) = folder.glob("*.swanlab")
    for text in (b"memory(GiB)", b"eval/reward"):
        assert text in log.read_bytes()
    texts = [file.read_text() for file in folder.glob("media/**/*.txt")]
    assert sum(re.search("<b>hi|ho", text) is not None for text in texts) == 2


@pytest.mark.slow
def test_several_at_once_and_one_whose_server_is_down(recorded, capsys, tmp_path):
    run = recorded("mlflow", mlflow_tracking_uri="http://127.0.0.1:9", close_timeout_s=20)
    out = capsys.readouterr().out
    assert out.count("tracker 'mlflow' does not work") == 1
    assert "lost: 4 completion groups, 3 steps, 1 warning" in out
    assert len(run.metrics.read_text().splitlines()) == 3
