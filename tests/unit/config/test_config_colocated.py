"""Where policy and rollout engines share GPUs: the rules, and how `placement: auto` is decided."""

import pytest
from config_cases import values
from test_config_rules import problems

from rlsys.config import Config
from rlsys.config.roles import decide_placement, plan_roles

COLOCATED = {"placement": "colocated"}


def config(**sections):
    return Config.model_validate(values(**sections))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rollout": {"max_staleness": 1}}, ["max_staleness = 1", "set max_staleness to 0"]),
        (
            {"rollout": {"tensor_parallel_size": 2}, "policy": {"world_size": 2}},
            ["tensor_parallel_size = 2", "rollout.num_engines to 2"],
        ),
        ({"rollout": {"num_engines": 2}}, ["num_engines = 2", "at most 1 engines"]),
        ({"weight_sync": {"transport": "nccl"}}, ["transport = nccl", "to auto"]),
        (
            {"policy": {"megatron_kwargs": {"nccl_ub": True, "cuda_graph_impl": "none"}}},
            ["megatron_kwargs.nccl_ub = True keeps addresses", "placement to dedicated"],
        ),
    ],
)
def test_what_cannot_take_turns_is_refused(sections, words):
    (text,) = problems(**COLOCATED, **sections)
    for word in words:
        assert word in text
    assert problems(placement="auto", **sections) == []


def test_settings_of_shared_gpus_without_them_are_refused():
    (text,) = problems(weight_sync={"transport": "ipc"})
    assert "transport = ipc" in text
    (text,) = problems(placement="dedicated", colocated={"offload_weights": True})
    assert "offload_weights = True has no effect" in text
    saved = config(placement="dedicated").model_dump(mode="json")
    assert Config.model_validate(saved).placement == "dedicated"


@pytest.mark.parametrize(
    ("sections", "num_gpus", "placement"),
    [
        ({}, 2, "dedicated"),
        ({}, 1, "colocated"),
        ({}, 0, "dedicated"),  # too few for either: the plainer one says what is missing
        ({"policy": {"world_size": 2}}, 2, "colocated"),
        ({"policy": {"world_size": 2}}, 1, "dedicated"),
        ({"rollout": {"max_staleness": 1}}, 1, "dedicated"),
        ({"reference": {"placement": "own"}, "grpo": {"beta": 0.1}}, 2, "colocated"),
        ({"placement": "dedicated"}, 1, "dedicated"),
        ({"placement": "colocated"}, 8, "colocated"),
    ],
)
def test_auto_shares_gpus_only_where_there_are_too_few(sections, num_gpus, placement):
    decided = decide_placement(config(**sections), device="cuda", num_gpus=num_gpus)
    assert decided.placement == placement


def test_auto_on_cpu_has_a_process_that_works_at_any_time():
    assert decide_placement(config(), device="cpu", num_gpus=0).placement == "dedicated"


def test_engines_on_the_policys_gpus_need_none():
    run = config(
        **COLOCATED, policy={"world_size": 2}, rollout={"num_engines": 4, "engines_per_gpu": 2}
    )
    roles = plan_roles(run, device="cuda")
    assert sum(role.gpus for role in roles) == 2
    owners = [role.shares_gpu_of for role in roles if role.name == "rollout"]
    assert owners == [("policy", 0), ("policy", 0), ("policy", 1), ("policy", 1)]
