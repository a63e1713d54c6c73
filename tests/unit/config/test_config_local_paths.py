"""Where the models and plugins of a config are, for processes with another working directory."""

import socket

import pytest
from config_cases import config_of_paths

from rlsys.config.local_paths import with_absolute_paths
from rlsys.model.folder import resolve_model_path


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
    config = config_of_paths(
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
    config = config_of_paths(model={"path": "org/model"}, reward={"reward_model": ["org/judge"]})
    absolute = with_absolute_paths(config)
    assert absolute.model.path == "org/model"
    assert absolute.reference_path == "org/model"
    assert absolute.reward.model_paths == ["org/judge"]


def test_a_host_without_the_folder_names_itself_and_the_path(folder):
    path = str(folder / "only/there")
    with pytest.raises(ValueError, match=rf"host {socket.gethostname()} has no folder {path}: "):
        resolve_model_path(path)
