"""Where the models and plugins of a config are, for processes with another working directory."""

import socket
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import _dir_travel

from rlsys.config import Config
from rlsys.config.load import load_config
from rlsys.config.local_paths import JOB_COPY, left_out_of_job_copy, with_absolute_paths
from rlsys.model.folder import resolve_model_path
from rlsys.preflight.checks import check_run

REPOSITORY = Path(__file__).parents[3]


def make_config(**sections):
    return Config.model_validate(
        {
            "output_dir": "runs/out",
            "max_steps": 1,
            "data": {"dataset": ["data/train.jsonl", "org/data"]},
            "model": {"path": "runs/model"},
            "rollout": {"generation_batch_size": 4, "num_generations": 2},
            "reward": {"reward_funcs": ["format"]},
            **sections,
        }
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_here_is_named_from_the_root(folder):
    """A folder that is called as a model of the hub is, too: actors would ask the hub."""
    for name in ("org/policy", "org/reference", "org/judge", "here/judge"):
        (folder / name).mkdir(parents=True)
    (folder / "plugin.py").touch()
    plugins = {"external_plugins": ["plugin.py"]}
    config = make_config(
        model={"path": "org/policy"},
        reference={"path": "./org/reference"},
        data={"dataset": ["x.jsonl"], **plugins},
        grpo={"beta": 0.1, **plugins},
        reward={
            "reward_model": ["org/judge", "hub/judge"],
            "reward_params": {
                "reward_model": {"batch_size": 3},
                "reward_model:hub/judge": {"path": "here/judge"},
            },
            **plugins,
        },
    )
    absolute = with_absolute_paths(config)
    assert absolute.model.path == str(folder / "org/policy")
    assert absolute.reference_path == str(folder / "org/reference")
    assert absolute.reward.model_paths == [str(folder / "org/judge"), str(folder / "here/judge")]
    assert absolute.reward.names == config.reward.names  # weights and settings go by name
    assert absolute.reward.params["reward_model:org/judge"]["batch_size"] == 3
    for section in ("data", "grpo", "reward"):
        assert getattr(absolute, section).external_plugins == [str(folder / "plugin.py")]
    assert with_absolute_paths(absolute) == absolute


def test_ids_of_the_hub_stay_as_they_are(folder):
    config = make_config(model={"path": "org/model"}, reward={"reward_model": ["org/judge"]})
    absolute = with_absolute_paths(config)
    assert absolute.model.path == "org/model"
    assert absolute.reference_path == "org/model"
    assert absolute.reward.model_paths == ["org/judge"]


def test_a_host_without_the_folder_names_itself_and_the_path(folder):
    path = str(folder / "only/there")
    with pytest.raises(ValueError, match=rf"host {socket.gethostname()} has no folder {path}: "):
        resolve_model_path(path)


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
    left_out = left_out_of_job_copy(make_config(model={"path": path}))
    assert (path in left_out) == (path not in sent)


def test_only_a_job_has_a_copy(folder):
    (folder / ".gitignore").write_text("/runs/\n")
    assert left_out_of_job_copy(make_config()) == []


def test_the_run_says_why_a_job_lacks_its_files(tmp_path, monkeypatch, offline):
    """With the examples, whose data and models are in folders that .gitignore names."""
    copy = tmp_path / JOB_COPY / "package"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    (copy / ".gitignore").write_text((REPOSITORY / ".gitignore").read_text())
    for example in REPOSITORY.glob("examples/*/*.yaml"):
        config = load_config(str(example), []).config
        *_, last = check_run(config)
        named, _, reason = last.text.partition(": ")
        assert config.data.dataset[0] in named.split(", "), example
        assert "from which Ray leaves out what .gitignore" in reason
