"""How many threads the ranks of a run compute with on CPU."""

import pytest
from config_cases import write_config

from rlsys.config import SftConfig
from rlsys.config.load import load_config
from rlsys.config.roles import decide_cpu_threads, plan_roles

SFT = {"data": {"dataset": ["a"]}, "model": {"path": "m"}, "output_dir": "out", "max_steps": 1}


@pytest.mark.parametrize(
    ("policy", "cores", "threads"),
    [
        ({}, 8, 8),
        ({"world_size": 2}, 8, 4),
        ({"world_size": 3}, 8, 2),
        ({"world_size": 4}, 2, 1),
        ({"cpu_threads": 5}, 2, 5),
    ],
)
def test_supervised_ranks_share_all_cores(policy, cores, threads):
    config = SftConfig.model_validate(SFT | {"policy": policy})
    decided = decide_cpu_threads(config, device="cpu", cores=cores)
    assert decided.policy.cpu_threads == threads
    assert {role.cpu_threads for role in plan_roles(decided, device="cpu")} == {threads}
    assert decided.model_copy(update={"policy": config.policy}) == config


@pytest.mark.parametrize(
    ("sections", "threads"),
    [
        ({}, 6),
        ({"rollout": {"max_staleness": 1}}, 1),  # engines sample meanwhile
        ({"grpo": {"beta": 0.1}, "reference": {"world_size": 2, "placement": "own"}}, 3),
    ],
)
def test_grpo_takes_all_cores_where_its_roles_take_turns(tmp_path, sections, threads):
    config = load_config(write_config(tmp_path, **sections)).config
    assert config.policy.num_cpu_threads == 1  # until it is decided
    assert decide_cpu_threads(config, device="cpu", cores=6).policy.cpu_threads == threads


def test_on_gpus_threads_only_feed_the_gpu(tmp_path):
    config = load_config(write_config(tmp_path)).config
    assert decide_cpu_threads(config, device="cuda", cores=6).policy.cpu_threads == 1
