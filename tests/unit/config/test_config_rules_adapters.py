"""What a LoRA adapter means for the reference and for weight sync."""

import pytest
from config_cases import values
from test_config_rules import problems

from rlsys.config import Config
from rlsys.config.roles import plan_roles

KL = {"beta": 0.1}


def config(**sections):
    return Config.model_validate(values(**sections))


def roles(config):
    return {role.name for role in plan_roles(config, device="cuda")}


def test_the_base_of_a_policy_with_lora_is_the_reference_and_needs_no_actor():
    base = config(policy={"lora": {}}, grpo=KL)
    assert base.reference_is_base
    assert not base.has_reference_model
    assert not base.policy_shares_gpus
    assert "reference" not in roles(base)
    for other in (
        config(grpo=KL),
        config(policy={"lora": {}}, grpo=KL, reference={"path": "runs/other"}),
    ):
        assert other.has_reference_model
        assert "reference" in roles(other)
    without = config(policy={"lora": {}})
    assert not without.reference_is_base
    assert not without.has_reference_model


def test_a_saved_config_with_lora_is_accepted_as_it_is():
    saved = config(policy={"lora": {"rank": 4}}, grpo=KL).model_dump(mode="json")
    assert Config.model_validate(saved).reference_is_base


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"reference": {"sync_steps": 5}}, ["reference.sync_steps = 5", "adapter off", ".path"]),
        ({"reference": {"world_size": 2}}, ["reference.world_size = 2 changes nothing"]),
        ({"reference": {"placement": "own"}}, ["reference.placement = own changes nothing"]),
    ],
)
def test_settings_of_a_reference_that_is_the_base_are_refused(sections, words):
    (text,) = problems(policy={"lora": {}}, grpo=KL, **sections)
    assert all(word in text for word in words)
    sections["reference"]["path"] = "runs/other"
    assert problems(policy={"lora": {}, "world_size": 2}, grpo=KL, **sections) == []


def test_what_engines_get_of_an_adapter_needs_an_adapter():
    (text,) = problems(weight_sync={"lora": "adapter"})
    assert "weight_sync.lora = adapter is for adapters, and policy.lora is null" in text
    assert problems(weight_sync={"lora": "merged"}, policy={"lora": {}}) == []
