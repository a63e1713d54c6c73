"""Which files of a run Ray leaves out of a job, and that a run says so."""

from pathlib import Path

import pytest
from config_cases import config_of_paths
from ray._private.runtime_env.packaging import _dir_travel

from rlsys.config import Config
from rlsys.config.load import load_config
from rlsys.config.local_paths import JOB_COPY
from rlsys.config.method import schema_of
from rlsys.preflight.checks import check_run
from rlsys.preflight.job_copy import left_out_of_job_copy

REPOSITORY = Path(__file__).parents[3]


IGNORED = {".gitignore": "/runs/\n*.bin\n!kept.bin\n", "sub/.rayignore": "local/\n"}
PATHS = ("runs/model", "runs/a/b", "data/train.jsonl", "w.bin", "kept.bin", "sub/local/x", "local")


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_ray_leaves_out_of_a_job_are_known(tmp_path, monkeypatch, path):
    """What Ray itself sends of the same folder is what is not named."""
    sent = []
    for place in (tmp_path / "project", tmp_path / JOB_COPY / "package"):
        for name, text in IGNORED.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
    project = tmp_path / "project"
    (project / path).parent.mkdir(parents=True, exist_ok=True)
    (project / path).touch()
    _dir_travel(project, [], lambda p: sent.append(str(p.relative_to(project))), True)
    monkeypatch.chdir(tmp_path / JOB_COPY / "package")
    left_out = left_out_of_job_copy(config_of_paths(model={"path": path}))
    assert (path in left_out) == (path not in sent)


def test_only_a_job_has_a_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".gitignore").write_text("/runs/\n")
    assert left_out_of_job_copy(config_of_paths()) == []


def test_the_run_says_why_a_job_lacks_its_files(tmp_path, monkeypatch, offline):
    """With the examples, whose data and models are in folders that .gitignore names."""
    copy = tmp_path / JOB_COPY / "package"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    (copy / ".gitignore").write_text((REPOSITORY / ".gitignore").read_text())
    examples = REPOSITORY.glob("examples/*/*.yaml")
    for example in (path for path in examples if schema_of(path) is Config):
        config = load_config(str(example), []).config
        *_, last = check_run(config)
        named, _, reason = last.text.partition(": ")
        assert config.data.dataset[0] in named.split(", "), example
        assert "from which Ray leaves out what .gitignore" in reason
