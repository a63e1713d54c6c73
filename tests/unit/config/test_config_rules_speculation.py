"""rollout.speculative_config: what would change completions or their log-probs is refused."""

import pytest
from config_cases import values

from rlsys.config import Config
from rlsys.config.local_paths import with_absolute_paths
from rlsys.config.passed_through import vllm_option_problems

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


def config(speculation, **rollout):
    options = {"generation_batch_size": 16, "speculative_config": speculation, **rollout}
    return Config.model_validate(values(rollout=options))


@pytest.mark.parametrize(
    ("speculation", "rollout", "parts"),
    [
        ({}, {}, ["neither method nor model"]),
        ({"num_speculative_tokens": 3}, {}, ["neither method nor model", "method: ngram"]),
        ({"method": "eagle3", "model": "x"}, {}, ["eagle3 is not one of ngram", "hidden states"]),
        ({"method": "mtp", "num_speculative_tokens": 1}, {}, ["mtp is not one of"]),
        ({"method": "draft_model", "num_speculative_tokens": 2}, {}, ["needs model"]),
        ({"method": "ngram"}, {}, ["num_speculative_tokens = None", "such as 4"]),
        ({"model": "x", "num_speculative_tokens": 0}, {}, ["num_speculative_tokens = 0"]),
        (NGRAM | {"rejection_sample_method": "synthetic"}, {}, ["synthetic", "not the policy's"]),
        (NGRAM, {"min_p": 0.1}, ["min_p = 0.1", "top_p and top_k work"]),
        (NGRAM, {"stop": ["\n"]}, ["rollout.stop", "stop_token_ids"]),
        (NGRAM, {"router_replay": True}, ["router_replay", "rejected"]),
    ],
)
def test_what_would_be_wrong_is_refused_with_the_reason(speculation, rollout, parts):
    with pytest.raises(ValueError, match=r"rollout\.speculative_config") as caught:
        config(speculation, **rollout)
    for part in parts:
        assert part in str(caught.value)


def test_draft_models_do_not_sleep():
    draft = {"generation_batch_size": 16}
    draft["speculative_config"] = {"model": "x", "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="those of model x: use method ngram"):
        Config.model_validate(values(rollout=draft, placement="colocated"))


def test_a_model_alone_means_a_draft_model_with_an_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    mine = config({"model": "small", "num_speculative_tokens": 2})
    assert mine.rollout.speculation["method"] == "draft_model"
    assert "small" in mine.model_paths
    absolute = with_absolute_paths(mine).rollout.speculation
    assert absolute["model"] == str(tmp_path / "small")
    assert config(NGRAM).rollout.draft_model is None


def test_names_and_types_are_those_of_the_installed_vllm():
    assert vllm_option_problems(config(NGRAM | {"prompt_lookup_max": 3})) == []
    (typo,) = vllm_option_problems(config(NGRAM | {"prompt_lookup_maxx": 3}))
    assert "did you mean prompt_lookup_max?" in str(typo)
    (text,) = vllm_option_problems(config(NGRAM | {"prompt_lookup_max": "3"}))
    assert str(text).startswith("rollout.speculative_config.prompt_lookup_max = '3'")
