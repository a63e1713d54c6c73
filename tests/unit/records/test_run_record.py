import json

import pytest
from tracking_cases import make_config

from rlsys.config.load import save_config
from rlsys.files import JsonlWriter
from rlsys.records import find_runs, open_run
from rlsys.run.folder import RUNNING, RunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    save_config(make_config(run.path), run.config)
    with run.held():
        run.write_status(RUNNING)
    return run


def test_a_run_at_a_glance(run):
    writer = JsonlWriter(run.metrics)
    writer.append({"step": 0, "eval/reward": 0.25})
    for step in (1, 2):
        writer.append({"step": step, "time/step": 1.5, "global_step/max_steps": f"{step}/60"})
    writer.append({"step": 2, "eval/reward": 0.5})
    record = open_run(run.path)
    status = record.status
    assert (record.name, status.method, status.state) == ("run", "grpo", "killed")
    assert (status.step, status.steps, status.seconds) == (2, 60, 3.0)
    best = status.best_eval
    assert (best.metric, best.value, best.step) == ("eval/reward", 0.5, 2)
    assert status.started <= status.updated
    assert (status.exit_code, status.reason) == (None, None)
    run.record_end(3, "no GPU")
    assert (record.status.state, record.status.exit_code, record.status.reason) == (
        "ended",
        3,
        "no GPU",
    )
    assert record.config["max_steps"] == 60


@pytest.mark.parametrize(
    ("fields", "best"),
    [
        ({}, ("eval/reward", 3.0, 2)),
        ({"metric_for_best_model": "eval/kl"}, ("eval/kl", 9.0, 1)),
        ({"metric_for_best_model": "eval_kl", "greater_is_better": False}, ("eval/kl", 1.0, 3)),
        ({"metric_for_best_model": "reward"}, ("eval/reward", 3.0, 2)),
    ],
)
def test_the_best_evaluation_is_what_the_run_says(run, fields, best):
    data = {"dataset": ["train.jsonl"], "val_dataset": ["held_out.jsonl"]}
    config = make_config(run.path, checkpoint=fields, data=data, eval_steps=1)
    save_config(config, run.config)
    values = {"eval/reward": [2.0, 3.0, None], "eval/kl": [9.0, 2.0, 1.0]}
    for step in (1, 2, 3):
        JsonlWriter(run.metrics).append(
            {"step": step} | {n: v[step - 1] for n, v in values.items()}
        )
    found = open_run(run.path).status.best_eval
    assert (found.metric, found.value, found.step) == best


def test_a_run_that_lacks_files_gives_what_it_has(run):
    record = open_run(run.path)
    for path in (run.config, run.metrics):
        path.unlink(missing_ok=True)
    status = record.status
    assert (status.method, status.step, status.steps, status.best_eval) == (None, 0, None, None)
    assert record.warnings() == record.timeline() == record.actors() == []
    assert record.config == {}
    run.actors.write_text('[{"role": "poli')
    run.config.write_text("- [")
    assert record.actors() == []
    assert record.config == {}


def test_warnings_spans_and_actors(run):
    record = open_run(run.path)
    JsonlWriter(run.warnings).append({"step": 3, "warning": "entropy_collapse"})
    about = {"actor": "policy 0", "role": "policy", "phase": "update"}
    spans = [about | {"start": s, "end": s + 2, "step": 1} for s in (10.0, 20.0, 30.0)]
    spans[1]["busy"] = 1.5
    broken = [{"actor": "policy 0"}, about | {"start": 3.0, "end": 2.0, "step": 1}]
    JsonlWriter(run.timeline).append(*spans, *broken)
    run.actors.write_text(json.dumps([{"role": "policy", "rank": 0}]))
    assert record.warnings() == [{"step": 3, "warning": "entropy_collapse"}]
    assert record.timeline() == spans
    assert record.timeline(start=12.0, end=20.0) == spans[:2]
    assert record.timeline(start=23.0, end=29.0) == []
    assert record.actors() == [{"role": "policy", "rank": 0}]


def test_a_folder_that_is_not_a_run_is_an_error_that_helps(run, tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not the output directory of a run.*It holds runs: run"):
        open_run(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "config.yaml").write_text("{}")
    assert find_runs(tmp_path) == [run.path]
    assert find_runs(tmp_path / "nowhere") == []
