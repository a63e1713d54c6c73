"""Adapters and frozen parameters are checked before anything starts."""

import pytest
from preflight_cases import only


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"lora": {"target_modules": ["query"]}}, "query matches nothing"),
        ({"lora": {"path": "/nowhere"}}, "has no adapter_config.json"),
        ({"freeze_parameters": ["transformer.h"]}, "no tensor of the model starts with"),
    ],
)
def test_what_does_not_fit_the_model_is_a_problem(problems, policy, words):
    assert words in only(problems(policy=policy))


def test_an_adapter_that_fits_is_none(problems):
    assert not problems(policy={"lora": {"rank": 4, "target_modules": ["q_proj", "o_proj"]}})
