"""`rlsys reward-model` as a command: it learns, and its folder scores as transformers does."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from scorer_cases import open_classifier

from rlsys import cli
from rlsys.files import read_jsonl
from rlsys.model.chat_template import ChatTemplate
from rlsys.rewards.builtin.reward_model import RewardModel

EXAMPLE = Path(__file__).parents[2] / "examples/reward_model"

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The files of the example: fewer pairs than it has by default."""
    folder = tmp_path_factory.mktemp("help-desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        import prepare

        prepare.main(["--out", str(folder), "--train", "1200", "--validation", "64"])
        sys.modules.pop("prepare")
    return folder


def run(desk, name, output_dir, *words):
    """Run a config of the example; its metrics."""
    path, command = EXAMPLE / f"{name}.yaml", "reward-model"
    kind = "pairs" if name == "reward_model" else "topics"
    places = {
        "output_dir": output_dir,
        "model.path": desk / "model",
        "data.dataset": desk / f"{kind}.jsonl",
        "data.val_dataset": desk / f"{kind}_held_out.jsonl",
    }
    given = [word for field, value in places.items() for word in (f"--{field}", str(value))]
    assert cli.main([command, str(path), *given, *words]) == 0
    return list(read_jsonl(output_dir / "metrics.jsonl"))


def held_out(metrics, name):
    return [row[f"eval/{name}"] for row in metrics if f"eval/{name}" in row]


def test_a_reward_model_learns_and_scores_as_transformers(desk, tmp_path):
    metrics = run(desk, "reward_model", tmp_path / "run", "--max_steps", "75")
    accuracies = held_out(metrics, "accuracy")
    assert accuracies[0] < 0.8
    assert accuracies[-1] > 0.9
    assert held_out(metrics, "num_pairs") == [64.0] * 4
    trained = [row for row in metrics if "loss" in row]
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"} <= trained[0].keys()
    assert trained[-1]["num_tokens"] > trained[0]["num_tokens"]

    final = tmp_path / "run/final"
    reward = RewardModel(str(final), batch_size=3)
    rows = list(read_jsonl(desk / "pairs_held_out.jsonl"))[:8]
    conversations = [
        [*row["prompt"], *row[kind]] for row in rows for kind in ("chosen", "rejected")
    ]
    scores = asyncio.run(reward([""] * 16, conversations))
    model, template = open_classifier(final), ChatTemplate(reward._tokenizer)
    with torch.no_grad():
        expected = [
            model(torch.tensor([template.answered_tokens(turns, None)])).logits.item()
            for turns in conversations
        ]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) >= 7


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(desk, tmp_path):
    words = ("--eval_steps", "null", "--data.val_dataset", "[]", "--checkpoint.save_steps", "3")
    lr = ("--policy.lr_scheduler_type", "constant", "--policy.warmup_ratio", "0")
    whole = run(desk, "reward_model", tmp_path / "whole", "--max_steps", "6", *words, *lr)
    run(desk, "reward_model", tmp_path / "parts", "--max_steps", "3", *words, *lr)
    again = ("--max_steps", "6", "--checkpoint.resume", *words, *lr)
    parts = run(desk, "reward_model", tmp_path / "parts", *again)
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    assert parts[-1]["num_tokens"] == whole[-1]["num_tokens"]


@pytest.mark.slow
def test_an_adapter_and_a_classifier_learn(desk, tmp_path):
    lora = ("--policy.lora.rank", "8", "--max_steps", "100")
    metrics = run(desk, "reward_model", tmp_path / "lora", *lora)
    assert held_out(metrics, "accuracy")[-1] > 0.9
    assert (tmp_path / "lora/final/model.safetensors").exists()
    metrics = run(desk, "topics", tmp_path / "topics", "--max_steps", "60")
    assert held_out(metrics, "accuracy")[-1] > 0.9
    config = open_classifier(tmp_path / "topics/final").config
    assert config.id2label[1] == "parcel"
    assert config.problem_type == "single_label_classification"


@pytest.mark.slow
def test_grpo_learns_from_the_reward_model(desk, tmp_path):
    run(desk, "reward_model", tmp_path / "reward", "--max_steps", "75")
    of_policy = ("--model.path", str(desk / "model"), "--output_dir", str(tmp_path / "sft"))
    data = ("--data.dataset", str(desk / "answers.jsonl"))
    assert cli.main(["sft", str(EXAMPLE / "warm_start.yaml"), *of_policy, *data]) == 0
    words = (
        *("--output_dir", str(tmp_path / "grpo"), "--model.path", str(tmp_path / "sft/final")),
        *("--reward.reward_model", str(tmp_path / "reward/final")),
        *("--data.dataset", str(desk / "prompts.jsonl")),
        *("--data.val_dataset", str(desk / "prompts_held_out.jsonl")),
        *("--max_steps", "20"),
    )
    assert cli.main(["grpo", str(EXAMPLE / "grpo.yaml"), *words]) == 0
    rewards = held_out(list(read_jsonl(tmp_path / "grpo/metrics.jsonl")), "reward")
    assert rewards[-1] > rewards[0] + 0.5
