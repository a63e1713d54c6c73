"""Options of megatron-core that configs pass through, and those that rlsys sets itself."""

import pytest
from family_models import save_family_model
from policy_cases import LAYOUTS, policy_config

from rlsys.config.passed_through import (
    MEGATRON_DEFAULTS,
    MEGATRON_FIELDS,
    MEGATRON_FIXED,
    MEGATRON_MODEL,
    MEGATRON_REFUSED,
)

pytestmark = pytest.mark.system

FAMILIES = ("deepseek_v3", "mistral-window", "qwen2_moe")
"""Models whose options differ most: latent attention, sigmoid routers, windows, shared experts."""


def test_the_tables_are_what_rlsys_sets(lab, policy_models, tmp_path):
    """Nobody can set what rlsys sets, and nothing is refused that rlsys no longer sets."""
    for name in FAMILIES:
        save_family_model(tmp_path / name, name)
    policies = [
        policy_config(policy_models["qwen3-tied"], recompute="full"),
        *(policy_config(tmp_path / name, recompute="selective") for name in FAMILIES),
    ]
    names = {name for config in policies for name in lab.policy(config).call("own_options")[0]}
    assert names - MEGATRON_MODEL == {*MEGATRON_FIELDS, *MEGATRON_FIXED, *MEGATRON_DEFAULTS}
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
