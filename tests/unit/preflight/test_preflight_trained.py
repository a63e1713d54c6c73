"""Adapters and frozen parameters are checked before anything starts."""

import json

import pytest
from config_cases import write_model, write_sft_run
from preflight_cases import only

from rlsys.config import SftConfig
from rlsys.config.load import load_config_as
from rlsys.preflight.trained import base_note


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"lora": {"target_modules": ["query"]}}, "query matches nothing"),
        ({"lora": {"path": "/nowhere"}}, "there is no folder /nowhere on this machine"),
        ({"lora": {"path": "/"}}, "/ has no adapter_config.json"),
        ({"freeze_parameters": ["transformer.h"]}, "no tensor of the model starts with"),
    ],
)
def test_what_does_not_fit_the_model_is_a_problem(problems, policy, words):
    assert words in only(problems(policy=policy))


@pytest.mark.parametrize("base", ["model", "other", "org/model", None])
def test_an_adapter_of_another_base_of_the_same_shape_is_noted(tmp_path, base):
    write_model(tmp_path / "other")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    named = str(tmp_path / base) if base in ("model", "other") else base
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    path = write_sft_run(tmp_path, policy={"lora": {"path": str(adapter)}})
    config = load_config_as(SftConfig, path).config
    note = base_note(config, tmp_path / "model")
    assert (note is not None) == (base in ("other", "org/model"))
    assert note is None or f"was trained on {named} " in note


def test_an_adapter_that_fits_is_none(problems):
    assert not problems(policy={"lora": {"rank": 4, "target_modules": ["q_proj", "o_proj"]}})
