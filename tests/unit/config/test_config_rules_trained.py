"""Rules between the fields that say which parameters are trained."""

import pytest

from rlsys.config import PolicyConfig
from rlsys.config.rules_trained import trained_rule_problems

LORA = {"rank": 4}


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (
            {"lora": LORA, "freeze_parameters": ["model"]},
            "policy.freeze_parameters with policy.lora",
        ),
        ({"lora": LORA, "trainable_parameters_regex": "norm"}, "trainable_parameters_regex with"),
        ({"lora": LORA, "megatron_kwargs": {"moe_shared_expert_overlap": True}}, "overlap with"),
        ({"lora": LORA, "megatron_kwargs": {"use_transformer_engine_op_fuser": True}}, "fuser"),
        ({"lora": LORA, "overlap_param_gather": True}, "before they are gathered"),
        ({"trainable_parameters": ["lm_head"]}, "nothing is: set policy.freeze_parameters"),
    ],
)
def test_contradictions_are_named(policy, words):
    (problem,) = trained_rule_problems(PolicyConfig(**policy))
    assert words in problem.text


@pytest.mark.parametrize(
    "policy",
    [
        {"lora": LORA},
        {"freeze_parameters_ratio": 0.5, "trainable_parameters": ["lm_head"]},
        {"lora": LORA, "megatron_kwargs": {"moe_shared_expert_overlap": False}},
    ],
)
def test_what_fits_is_none(policy):
    assert not list(trained_rule_problems(PolicyConfig(**policy)))
