"""A config for a model of each family: read, of sizes that fit, and as its README says."""

import json
from pathlib import Path

import pytest
from published_models import DENSE, HYBRIDS, PARAMETERS, PUBLISHED

from rlsys.config.fields import config_fields
from rlsys.config.load import load_config
from rlsys.config.roles import plan_roles
from rlsys.model.families import FAMILIES
from rlsys.model.memory import estimate_memory
from rlsys.model.shape import read_model_shape
from rlsys.preflight.experts import expert_problems
from rlsys.preflight.memory import gpu_warnings
from rlsys.preflight.model import model_problems

FOLDER = Path(__file__).parents[2] / "examples/models"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
GPU_GIB = 79.0
"""Memory that GPUs of 80 GB have for a process."""
EARLIER = {"llama", "qwen2", "qwen3", "qwen3_moe"}
"""Families of the other examples."""
RELATED = {
    "deepseek_v3": "deepseek_v2",
    "ministral": "mistral",
    "ministral3": "mistral",
    "qwen3_5_moe_text": "qwen3_next",
}
"""Families without a config of their own -> the one whose config is a start for them."""


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request):
    return request.param


def with_published_model(path, tmp_path, name=None):
    """The config with a folder that holds its model's config.json, or `name`'s; the shape."""
    # Chat models have the sizes of their base models.
    name = name or Path(load_config(path).config.model.path).name.removesuffix("-Chat")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = load_config(path, ["--model.path", str(tmp_path)]).config
    return config, read_model_shape(tmp_path, may_bridge=True)


@pytest.mark.parametrize("name", DENSE | HYBRIDS)
def test_published_sizes_are_right(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    shape = read_model_shape(tmp_path, may_bridge=True)
    assert shape.num_params == pytest.approx(PARAMETERS[name], rel=0.01)


def test_the_parallel_sizes_fit_the_model(path, tmp_path):
    config, shape = with_published_model(path, tmp_path)
    assert [problem.text for problem in model_problems(config) if not problem.only_here] == []
    assert list(expert_problems(config, shape)) == []


def test_sizes_that_do_not_fit_are_seen(tmp_path):
    config, _ = with_published_model(FOLDER / "glm4_9b.yaml", tmp_path)
    wrong = config.policy.model_copy(update={"tensor_parallel_size": 4})
    problems = model_problems(config.model_copy(update={"policy": wrong}))
    assert "does not divide the model's KV heads 2" in "\n".join(p.text for p in problems)


def table_row(path, tmp_path, name=None):
    """The row of README.md's table; asserts that the model fits the GPUs."""
    config, shape = with_published_model(path, tmp_path, name)
    estimates = estimate_memory(config, shape, shape, device="cuda")
    assert gpu_warnings(config, estimates, GPU_GIB) == []
    policy, rollout = estimates
    gpus = sum(role.gpus for role in plan_roles(config, device="cuda"))
    ranks = config.policy.world_size
    engines = gpus - ranks
    trains = f"{ranks} GPUs of 80 GB train" if ranks > 1 else "1 GPU of 80 GB trains"
    samples = f"{engines} sample" if engines > 1 else "1 samples"
    assert path.read_text().partition("\n")[0].endswith(f": {trains}, {samples}.")
    beside_cache = rollout.total_gib - rollout.gib["KV cache"]
    model = load_config(path).config.model.path
    return (
        f"| [{path.name}]({path.name}) | `{model}` | `{shape.model_type}` | {gpus} "
        f"| {ranks} x {policy.total_gib:.0f} GiB "
        f"| {engines} x {beside_cache:.0f} GiB |"
    )


@pytest.mark.parametrize(
    ("config", "name"),
    [("mistral_7b", "Ministral-8B-Instruct-2410"), ("deepseek_v2_lite", "Moonlight-16B-A3B")],
)
def test_a_config_fits_the_other_model_that_its_readme_names(tmp_path, config, name):
    path = FOLDER / f"{config}.yaml"
    table_row(path, tmp_path, name)
    config, _ = with_published_model(path, tmp_path, name)
    assert [problem.text for problem in model_problems(config) if not problem.only_here] == []


def test_the_readme_has_the_estimate(path, tmp_path):
    assert table_row(path, tmp_path) in (FOLDER / "README.md").read_text().splitlines()


def test_nothing_repeats_a_default(path):
    resolved, fields = load_config(path), config_fields()
    dump = resolved.config.model_dump()
    for name in (name for name, origin in resolved.origins.items() if origin == "file"):
        section, _, field = name.rpartition(".")
        value = (dump[section] if section else dump)[field]
        assert value != fields[name].get_default(call_default_factory=True), name
    assert len(path.read_text().splitlines()) <= 25


def test_each_new_family_has_a_config(tmp_path):
    types = {with_published_model(path, tmp_path)[1].model_type for path in CONFIGS}
    assert types - set(FAMILIES) == {"glm4"}  # through mcore-bridge
    assert set(FAMILIES) - types - EARLIER == set(RELATED)
    assert set(RELATED.values()) <= types
