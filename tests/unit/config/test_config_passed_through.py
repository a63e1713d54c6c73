"""rollout.engine_kwargs and policy.megatron_kwargs: what rlsys sets itself is refused."""

import pytest
from config_cases import values

from rlsys.config import Config
from rlsys.config.fields import config_fields
from rlsys.config.passed_through import (
    MEGATRON,
    MEGATRON_DEFAULTS,
    MEGATRON_FIELDS,
    MEGATRON_FIXED,
    MEGATRON_MODEL,
    MEGATRON_REFUSED,
    VLLM,
    VLLM_DEFAULTS,
    VLLM_FIELDS,
    VLLM_FIXED,
    VLLM_REFUSED,
    megatron_kwargs_problems,
    vllm_kwargs_problems,
    vllm_option_problems,
)
from rlsys.library_options import options_of


def config(engine_kwargs=None, megatron_kwargs=None):
    """A config as pydantic takes it, without the rules between fields."""
    plain = Config.model_validate(values())
    rollout = plain.rollout.model_copy(update={"engine_kwargs": engine_kwargs or {}})
    policy = plain.policy.model_copy(update={"megatron_kwargs": megatron_kwargs or {}})
    return plain.model_copy(update={"rollout": rollout, "policy": policy})


@pytest.mark.parametrize("table", [VLLM_FIELDS, MEGATRON_FIELDS])
def test_the_fields_that_options_come_from_exist(table):
    named = {field for fields in table.values() for field in fields.split(", ")}
    assert named <= set(config_fields())


def test_every_name_is_an_option_of_an_installed_library():
    """Newer ones may have lost some: a table that is refused by name harms nobody."""
    assert {*VLLM_FIELDS, *VLLM_FIXED, *VLLM_DEFAULTS, *VLLM_REFUSED} <= set(options_of(*VLLM))
    tables = {*MEGATRON_FIELDS, *MEGATRON_FIXED, *MEGATRON_DEFAULTS, *MEGATRON_REFUSED}
    assert tables | MEGATRON_MODEL <= set(options_of(*MEGATRON))


def test_what_rlsys_sets_is_refused_with_the_field_or_the_reason():
    mine = config(
        {"max_model_len": 5, "hf_overrides": {}, "enable_prefix_caching": False},
        {"lr": 1e-3, "calculate_per_token_loss": True, "moe_router_fusion": True},
    )
    found = [*vllm_kwargs_problems(mine), *megatron_kwargs_problems(mine)]
    assert [str(problem) for problem in found] == [
        "rollout.engine_kwargs: rlsys sets max_model_len itself, from data.max_prompt_length and "
        "rollout.max_completion_length: set that instead",
        "rollout.engine_kwargs: hf_overrides cannot be set, because it belongs to the model, whose "
        "config.json vLLM and transformers read too: leave it out",
        "policy.megatron_kwargs: rlsys sets lr itself, from policy.lr: set that instead",
        "policy.megatron_kwargs: calculate_per_token_loss cannot be set, because rlsys's loss has "
        "the denominators of the whole step already: leave it out",
    ]
    with pytest.raises(ValueError, match="rlsys sets lr itself"):
        Config.model_validate(values(policy={"megatron_kwargs": {"lr": 1e-3}}))


def test_where_a_library_is_not_installed_the_check_says_so(monkeypatch):
    from rlsys.config import passed_through

    monkeypatch.setattr(passed_through, "VLLM", ("no_such_package", VLLM[1]))
    (problem,) = vllm_option_problems(config({"enforce_eager": True}))
    assert problem.only_here
    assert "no_such_package is not installed here, so enforce_eager could not be" in str(problem)
    assert vllm_option_problems(config()) == []
