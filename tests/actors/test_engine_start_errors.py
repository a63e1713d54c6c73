"""Engines that cannot start say why: the error is the engine's own, whichever process raised it."""

import json
import re
import shutil

import pytest

from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import ActorFailure

pytestmark = pytest.mark.system


@pytest.fixture
def damaged_model(tiny_models, tmp_path):
    """A model whose weight file ends too early."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_models[True, 1], folder)
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


@pytest.fixture
def start_error(ray_cluster, rollout_config):
    """The text of what is raised when engines of a config start."""

    def start(model_path, **rollout):
        engines = RolloutActors(rollout_config(model_path, **rollout), device="cpu")
        try:
            with pytest.raises(ActorFailure) as caught:
                engines.start()
        finally:
            engines.close()
        return str(caught.value)

    return start


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_last_line_says_what_vllm_could_not_do(start_error, damaged_model, workers):
    error = start_error(damaged_model, tensor_parallel_size=workers)
    assert re.search("SafetensorError.*file not fully covered", error.splitlines()[-1])


def test_a_model_that_vllm_would_take_for_another_is_named(start_error, tiny_models, tmp_path):
    folder = tmp_path / "unknown"
    shutil.copytree(tiny_models[True, 1], folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"architectures": ["FooForCausalLM"]}))
    last_line = start_error(folder).splitlines()[-1]
    assert f"{folder / 'config.json'}: architectures = ['FooForCausalLM']" in last_line
