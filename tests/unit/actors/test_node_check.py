"""What a node lacks of what its roles read and write is named before they start."""

import os

import pytest
from config_cases import config_of_paths

from rlsys.actors.node_check import Seen, different_versions, look, problems_of_node
from rlsys.config.local_paths import NeededPath, needed_paths, with_absolute_paths
from rlsys.plugins.load import files_beside_plugins, load_plugins

NODE = "node b (10.0.0.2)"


def problems(path, there, *, written=False, marks=None, field="model.path"):
    here = look([str(path)], marks or {})
    needed = [NeededPath(str(path), field, ("policy", "rollout"), written=written)]
    return [str(p) for p in problems_of_node(NODE, needed, here=here, there=there)]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345678")
    return folder


def test_what_is_the_same_on_both_sides_is_no_problem(model, tmp_path):
    marks = {str(tmp_path): str(tmp_path / "mark")}
    (tmp_path / "mark").touch()
    assert problems(model, look([str(model)], {})) == []
    assert problems(tmp_path, look([str(tmp_path)], marks), written=True, marks=marks) == []
    (model / ".cache").touch()  # of a tool; no file of a model
    assert problems(model, look([str(model)], {})) == []


def test_a_folder_that_the_node_does_not_see(model):
    (text,) = problems(model, Seen({}, {}, {}))
    assert text == (
        f"{NODE} does not see {model} (model.path, which policy and rollout processes need there): "
        "put it on a disk that all nodes mount there, or copy it to each node under the same path"
    )


def test_another_model_under_the_same_path(model):
    there = look([str(model)], {})
    (model / "model.safetensors").write_bytes(b"another size")
    (text,) = problems(model, there)
    assert text.startswith(f"{NODE} has another {model} than the driver (model.path, which ")


def test_a_plugin_with_other_contents(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("x = 1")
    there = look([str(plugin)], {})
    plugin.write_text("x = 2")  # as many bytes
    (text,) = problems(plugin, there, field="reward.external_plugins")
    assert "has another" in text
    assert "reward.external_plugins" in text


def test_a_folder_of_the_nodes_own_is_not_the_drivers_output_dir(tmp_path):
    """It exists on both hosts, and checkpoints would be torn in two."""
    mark = tmp_path / "mark"
    marks = {str(tmp_path): str(mark)}
    there = look([str(tmp_path)], marks)
    mark.touch()
    (text,) = problems(tmp_path, there, written=True, marks=marks, field="output_dir")
    assert f"has another {tmp_path} than the driver (output_dir" in text
    assert "copy it" not in text


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs a folder nobody can write in")
def test_a_folder_that_nothing_can_be_written_into(tmp_path):
    folder = "/proc/self"  # root may not write there either
    there = look([folder], {folder: f"{folder}/status"})
    here = Seen({folder: "the driver's"}, {}, {})
    needed = [NeededPath(folder, "output_dir", ("policy",), written=True)]
    (problem,) = problems_of_node(NODE, needed, here=here, there=there)
    assert f"cannot write into {folder}" in str(problem)


def test_versions_that_differ_are_noted():
    seen = {"node a": Seen({}, {}, {"torch": "2"}), "node b": Seen({}, {}, {"torch": "3"})}
    (note,) = different_versions(seen)
    assert note == "nodes have different versions of torch: 2 on node a; 3 on node b"
    assert not list(different_versions({"node a": seen["node a"]}))


def test_each_role_needs_what_it_reads(tmp_path, monkeypatch, forget_registrations):
    """Everything that a config names is needed; data is for the driver alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "reference", "judge", "adapter", "run"):
        (tmp_path / name).mkdir()
    for name in ("loss.py", "helper.py", "scores.py", "rows.py", "train.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/beside_node_check.py").write_text("VALUE = 1")
    (tmp_path / "plugins/reward.py").write_text("import beside_node_check")
    config = config_of_paths(
        model={"path": "policy"},
        reference={"path": "reference"},
        policy={"lora": {"rank": 4}},
        data={"dataset": ["train.jsonl"], "external_plugins": ["rows.py"]},
        grpo={"beta": 0.1, "external_plugins": ["loss.py"]},
        reward={
            "reward_funcs": ["scores.py:score"],
            "reward_model": ["judge"],
            "external_plugins": ["plugins/reward.py"],
        },
        output_dir="run",
    )
    load_plugins(config.reward.external_plugins)
    needed = needed_paths(with_absolute_paths(config), files_beside_plugins())
    scorers, policy = ("reward", "reward_model"), ("policy",)
    assert {(p.path.removeprefix(f"{tmp_path}/"), p.roles, p.written) for p in needed} == {
        ("run", policy, True),
        ("policy", ("policy", "rollout"), False),
        ("reference", ("reference",), False),
        ("judge", ("reward_model",), False),
        ("scores.py", ("reward",), False),
        ("rows.py", scorers, False),
        ("plugins/reward.py", scorers, False),
        ("plugins/beside_node_check.py", scorers, False),
        ("loss.py", policy, False),
    }
