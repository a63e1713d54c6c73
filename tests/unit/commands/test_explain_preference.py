"""`rlsys explain` and `rlsys data preview` of a config for preference training."""

import io
import re

import pytest
from config_cases import write_preference_run
from rich.console import Console

from rlsys.commands.explain import explain
from rlsys.commands.explain_preference import LOSSES, describe_training, row_arithmetic
from rlsys.config import PreferenceConfig
from rlsys.config.load import load_config_as
from rlsys.config.method import schema_of


def load(path, *overrides):
    return load_config_as(PreferenceConfig, path, overrides)


def printed(path, *overrides) -> tuple[bool, str]:
    text = io.StringIO()
    ok = explain(load(path, *overrides), Console(file=text, width=200))
    return ok, text.getvalue()


def test_a_run_is_explained_with_its_reference(tmp_path):
    path = write_preference_run(tmp_path)
    assert schema_of(path) is PreferenceConfig
    ok, text = printed(path)
    assert ok, text
    assert "Ready to run." in text
    assert re.search(r"reference x 1 +CPU, ", text)
    assert re.search(r"pairs per step +4 = policy.global_batch_size", text)
    assert re.search(r"tokens a pair, at most +128 = 2 x data.max_length", text)
    after_config = text.partition("\nTraining\n")[2].lower()
    assert not [word for word in ("rollout", "completion", "vllm") if word in after_config]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_explained(tmp_path, loss_type):
    words = ["--preference.loss_type", loss_type]
    if loss_type in ("exo_pair", "robust"):
        words += ["--preference.label_smoothing", "0.1"]
    config = load(write_preference_run(tmp_path), *words).config
    pairs = dict(describe_training(config))
    assert pairs["loss"].startswith(LOSSES[loss_type])
    assert pairs["beta"] == ("2" if loss_type == "simpo" else "0.1")
    has_reference = loss_type not in ("cpo", "simpo", "orpo")
    if not has_reference:
        assert pairs["reference"] == f"none: preference.loss_type = {loss_type} knows no reference"
    assert ("likelihood" in pairs) == (loss_type in ("cpo", "orpo"))
    noun = "answer" if loss_type in ("kto", "apo_zero_unpaired") else "pair"
    assert f"{noun}s per step" in dict(row_arithmetic(config, noun))


def test_an_adapter_needs_no_reference_actors(tmp_path):
    text = printed(write_preference_run(tmp_path, policy={"lora": {"rank": 4}}))[1]
    assert re.search(r"reference x 0 +the policy with its adapter off, asked in every step", text)
    assert "reference x 1" not in text


def test_memory_has_policy_and_reference(tmp_path):
    text = printed(write_preference_run(tmp_path))[1]
    assert re.search(r"policy x 1 +reference x 1", text)


def test_the_reference_on_gpus_shares_those_of_the_policy(tmp_path, monkeypatch):
    monkeypatch.setattr("rlsys.commands.explain.visible_gpus", lambda: 2)
    monkeypatch.setattr("rlsys.commands.explain.guess_device", lambda config: "cuda")
    text = printed(write_preference_run(tmp_path))[1]
    assert "the GPU of the policy rank of the same number" in text
    text = printed(write_preference_run(tmp_path), "--reference.placement", "own")[1]
    assert re.search(r"reference x 1 +1 GPU each: number 1", text)
