"""Options of megatron-core that configs pass through, and those that rlsys sets itself."""

import pytest
from policy_cases import LAYOUTS, policy_config

from rlsys.config.passed_through import (
    MEGATRON_DEFAULTS,
    MEGATRON_FIELDS,
    MEGATRON_FIXED,
    MEGATRON_REFUSED,
)

pytestmark = pytest.mark.system


def test_the_tables_are_what_rlsys_sets(lab, policy_models, tiny_models):
    """Nobody can set what rlsys sets, and nothing is refused that rlsys no longer sets."""
    folder = policy_models["qwen3-tied"]
    policies = [
        policy_config(folder, recompute="full"),
        policy_config(folder, recompute="selective"),
        policy_config(tiny_models["experts", 1]),
    ]
    names = {name for config in policies for name in lab.policy(config).call("own_options")[0]}
    assert names == {*MEGATRON_FIELDS, *MEGATRON_FIXED, *MEGATRON_DEFAULTS}
    assert not names & set(MEGATRON_REFUSED)


def test_each_config_of_megatron_core_gets_its_own_options(lab, policy_models):
    passed = {
        "attention_softmax_in_fp32": False,  # TransformerConfig
        "initial_loss_scale": 8.0,  # OptimizerConfig
        "check_for_large_grads": True,  # DistributedDataParallelConfig
        "barrier_with_L1_time": False,  # the first two
    }
    config = policy_config(
        policy_models["qwen3-tied"],
        grpo={"beta": 0.1},
        megatron_kwargs=passed,
        **LAYOUTS["DP 2"],
    )
    found = lab.policy(config).call("options", list(passed))[0]
    both = {name: passed[name] for name in ("attention_softmax_in_fp32", "barrier_with_L1_time")}
    assert found["transformer"] == found["reference"] == both
    optimizer = {name: passed[name] for name in ("initial_loss_scale", "barrier_with_L1_time")}
    assert found["optimizer"] == optimizer
    assert found["ddp"] == {"check_for_large_grads": True}
