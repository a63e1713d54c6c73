import importlib.util

import numpy as np
import pytest
from tracking_cases import make_group

import rlsys
from rlsys.files import JsonlWriter
from rlsys.run.folder import RunDir
from rlsys.tracking.jsonl import CompletionsTracker

LIBRARIES = [name for name in ("pandas", "polars") if importlib.util.find_spec(name)]


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    writer = JsonlWriter(run.metrics)
    writer.append({"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0, "kl": 0.25})
    tracker = CompletionsTracker(run)
    tracker.log_completions(1, make_group(["a", "bb"], [0.0, 1.0]), [-1.0, 1.0])
    tracker.log_completions(2, make_group(["held out"], [1.0]), None, split="eval")
    tracker.close()
    return run


@pytest.mark.parametrize("library", LIBRARIES)
def test_metrics_and_completions_are_data_frames(run, library):
    found = rlsys.read_run(run.path, library=library)
    assert type(found.metrics).__module__.startswith(library)
    assert list(found.metrics.columns) == ["step", "kl", "reward"]
    assert np.array(found.metrics["step"]).tolist() == [1, 2]
    assert np.isnan(np.array(found.metrics["kl"])[0])
    completions = found.completions
    assert list(completions["text"]) == ["a", "bb"]
    assert list(completions["countdown"]) == [0.0, 1.0]
    assert list(found.search("countdown = 1")["id"]) == ["1-0-1"]
    assert list(found.search(sort="length", limit=1, columns=["text"])["text"]) == ["bb"]
    assert list(found.search(split="eval")["text"]) == ["held out"]


def test_whichever_library_is_installed_is_taken(run, monkeypatch):
    assert type(rlsys.read_run(run.path).metrics).__module__.startswith(LIBRARIES[0])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="read_run needs pandas or polars: pip install pandas"):
        rlsys.read_run(run.path)


def test_wrong_searches_and_folders_are_errors(run, tmp_path):
    with pytest.raises(ValueError, match="Columns are step"):
        rlsys.read_run(run.path).search("nope = 1")
    with pytest.raises(ValueError, match="not the output directory of a run"):
        rlsys.read_run(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        rlsys.nope  # noqa: B018
