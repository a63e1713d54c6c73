"""Settings of experts that do not fit the model or vLLM."""

import json
from pathlib import Path

import pytest
from config_cases import EXPERTS, values, write_model
from preflight_cases import only
from published_models import PUBLISHED

from rlsys.config import Config
from rlsys.model.shape import read_model_shape
from rlsys.preflight import experts
from rlsys.preflight.experts import expert_problems, replay_problems


@pytest.fixture
def mixture(tmp_path):
    write_model(tmp_path / "experts", **EXPERTS)
    return {"path": str(tmp_path / "experts")}


@pytest.mark.parametrize(
    ("word", "setting"),
    [
        ("--rollout.router_replay=true", "rollout.router_replay = true"),
        ("--policy.moe_aux_loss_coeff=0.01", "policy.moe_aux_loss_coeff = 0.01"),
        ("--policy.moe_z_loss_coeff=0.001", "policy.moe_z_loss_coeff = 0.001"),
        ("--policy.moe_router_dtype=fp32", "policy.moe_router_dtype = fp32"),
        (
            "--policy.moe_router_load_balancing_type=seq_aux_loss",
            "policy.moe_router_load_balancing_type = seq_aux_loss",
        ),
    ],
)
def test_a_dense_model_has_nothing_to_route(problems, mixture, word, setting):
    text = only(problems(word))
    assert text.startswith(f"{setting}, but the model has no experts (qwen3 is dense)")
    if "load_balancing" not in word:
        assert problems(word, model=mixture) == []


def test_a_way_to_balance_that_balances_nothing(problems, mixture):
    word = "--policy.moe_router_load_balancing_type=seq_aux_loss"
    assert "policy.moe_aux_loss_coeff = 0 balances none" in only(problems(word, model=mixture))
    assert problems(word, "--policy.moe_aux_loss_coeff=0.01", model=mixture) == []


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("0.9.2", True), ("0.25.1", True), ("0.26.0", False), ("0.32.0+cpu", False), (None, False)],
)
def test_a_vllm_without_routing_is_refused(problems, mixture, monkeypatch, version, is_refused):
    monkeypatch.setattr(experts, "installed_version", lambda _: version)
    found = problems("--rollout.router_replay=true", model=mixture)
    if is_refused:
        assert f"needs vLLM 0.26 or newer, and {version} is installed" in only(found)
        assert found[0].only_here
    else:
        assert found == []


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (
            "--policy.megatron_kwargs={moe_router_fusion: true}",
            "moe_router_fusion chooses experts in a kernel that cannot replay",
        ),
        (
            "--rollout.engine_kwargs={enable_prefix_caching: false}",
            "vLLM keeps the experts of rollout.router_replay with its prefix cache",
        ),
    ],
)
def test_options_with_which_nothing_can_be_replayed(problems, mixture, word, reason):
    assert problems(word, model=mixture) == []
    assert reason in only(problems(word, "--rollout.router_replay=true", model=mixture))


def test_routers_behind_mcore_bridge_stay_as_they_are(mixture):
    rollout = {"router_replay": True, "generation_batch_size": 16}
    bridged = mixture | {"bridge": "mcore_bridge"}
    config = Config.model_validate(values(model=bridged, rollout=rollout))
    shape = read_model_shape(Path(mixture["path"]))
    (problem,) = expert_problems(config, shape)
    assert "does not change the routers of models that mcore-bridge builds" in problem.text


@pytest.mark.parametrize("name", ["Moonlight-16B-A3B", "Qwen3-Next-80B-A3B-Instruct"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_replay_needs_a_prefix_cache(tmp_path, name, device):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    shape = read_model_shape(tmp_path)
    rollout = {"router_replay": True, "generation_batch_size": 16}
    config = Config.model_validate(values(device=device, rollout=rollout))
    found = [problem.text for problem in replay_problems(config, shape)]
    refused = [text for text in found if f"none for the attention of {shape.model_type}" in text]
    assert len(refused) == (device == "cpu")


def test_a_fused_router_has_other_groups_of_experts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["DeepSeek-V2"]))
    policy = {"megatron_kwargs": {"moe_router_fusion": True}}
    config = Config.model_validate(values(policy=policy))
    (problem,) = expert_problems(config, read_model_shape(tmp_path))
    assert "groups of experts are not those of deepseek_v2" in problem.text
