"""`rlsys explain` and `rlsys data preview` of a config for reward models and classifiers."""

import io
import json
import re

import pytest
from config_cases import write_reward_model_run
from rich.console import Console

from rlsys.commands.data_preview_scored import preview_scored
from rlsys.commands.explain import explain
from rlsys.commands.explain_reward_model import describe_training
from rlsys.config import RewardModelConfig
from rlsys.config.load import load_config_as
from rlsys.config.method import schema_of
from rlsys.data.scored import load_scored
from rlsys.data.scored_rows import ScoreRules
from rlsys.model.memory import GIB, estimate_policy
from rlsys.model.shape import read_model_shape


def load(path, *overrides):
    return load_config_as(RewardModelConfig, path, overrides)


def printed(path, *overrides) -> tuple[bool, str]:
    text = io.StringIO()
    ok = explain(load(path, *overrides), Console(file=text, width=200))
    return ok, text.getvalue()


def test_a_reward_model_is_explained(tmp_path):
    path = write_reward_model_run(
        tmp_path, reward_model={"center_rewards_coefficient": 0.01}, policy={"lora": {"rank": 4}}
    )
    assert schema_of(path) is RewardModelConfig
    ok, text = printed(path)
    assert ok, text
    assert "Ready to run." in text
    assert "Bradley-Terry" in text
    assert "+ 0.01 x mean of (chosen + rejected)^2" in text
    assert re.search(r"pairs per step +4 = policy.global_batch_size", text)
    assert re.search(r"tokens a pair, at most +128 = 2 x data.max_length", text)
    assert "; whole: score" in text
    after_config = text.partition("\nTraining\n")[2].lower()
    assert not [word for word in ("rollout", "completion", "vllm") if word in after_config]


def test_the_memory_is_that_of_a_score_head_and_not_of_logits(tmp_path):
    config = load(write_reward_model_run(tmp_path)).config
    shape = read_model_shape(tmp_path / "model", num_labels=1)
    estimate = estimate_policy(config, shape, device="cuda")
    # The states of both texts of all 4 pairs, and their gradient, in bfloat16.
    assert estimate.gib["logits"] * GIB == 8 * 64 * shape.hidden_size * 2 * 2
    assert estimate.gib["weights"] * GIB == pytest.approx(2 * shape.num_params, rel=0.01)


@pytest.mark.parametrize(
    ("section", "outputs"),
    [
        ({"problem_type": "regression"}, "1"),
        ({"problem_type": "single_label_classification", "num_labels": 3}, "3"),
        ({"problem_type": "multi_label_classification", "label_names": ["a", "b"]}, "2: a, b"),
    ],
)
def test_every_kind_is_explained(tmp_path, section, outputs):
    config = load(write_reward_model_run(tmp_path, reward_model=section)).config
    pairs = dict(describe_training(config))
    assert pairs["outputs"] == outputs
    assert "centring" not in pairs


def test_rows_are_shown_with_their_labels(tmp_path, tokenizer):
    path = write_reward_model_run(
        tmp_path,
        reward_model={
            "problem_type": "single_label_classification",
            "label_names": ["bad", "good"],
        },
    )
    rows = [{"text": "a b", "label": "good"}, {"text": "c d", "label": 0}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load(path).config
    data = load_scored(config.data, tokenizer, ScoreRules.of(config), seed=0, pad_token_id=None)
    text = io.StringIO()
    preview_scored(config, data, tokenizer, Console(file=text, width=100), num_rows=5)
    assert "train:1  label good" in text.getvalue()
    assert "train:2  label bad" in text.getvalue()
    assert "text, " in text.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    from answer_templates import TEMPLATES, tokenizer_of, unmarked

    return tokenizer_of(unmarked(TEMPLATES["qwen3"]))
