"""`rlsys reward-model` as a command: it learns, and its folder scores as transformers does."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from run_cases import RunProcess
from scorer_cases import open_classifier

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


def run(folder, command, name, **fields):
    """Run a config of the example in a folder; its metrics."""
    folder.mkdir(exist_ok=True)
    fields = {"output_dir": "out"} | fields
    words = [word for field, value in fields.items() for word in (f"--{field}", str(value))]
    path = str(EXAMPLE / f"{name}.yaml")
    started = RunProcess(folder, path, *words, subcommand=command)
    assert started.wait() == 0, started.log
    started.end()
    return list(read_jsonl(started.out.metrics))


def train(desk, folder, name="reward_model", **fields):
    """Train a score head on the rows of the desk."""
    kind = "topics" if name == "topics" else "pairs"
    rows = {
        "model.path": desk / "model",
        "data.dataset": desk / f"{kind}.jsonl",
        "data.val_dataset": desk / f"{kind}_held_out.jsonl",
    }
    return run(folder, "reward-model", name, **rows | fields)


def held_out(metrics, name):
    return [row[f"eval/{name}"] for row in metrics if f"eval/{name}" in row]


def test_a_reward_model_learns_and_scores_as_transformers(desk, tmp_path):
    metrics = train(desk, tmp_path / "run", max_steps=75)
    accuracies = held_out(metrics, "accuracy")
    assert accuracies[0] < 0.8
    assert accuracies[-1] > 0.9
    assert held_out(metrics, "num_pairs") == [64.0] * 4
    trained = [row for row in metrics if "loss" in row]
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"} <= trained[0].keys()
    assert trained[-1]["num_tokens"] > trained[0]["num_tokens"]

    final = tmp_path / "run/out/final"
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
    fields = {"eval_steps": "null", "data.val_dataset": "[]", "checkpoint.save_steps": 3}
    fields |= {"policy.lr_scheduler_type": "constant", "policy.warmup_ratio": 0}
    whole = train(desk, tmp_path / "whole", max_steps=6, **fields)
    train(desk, tmp_path / "parts", max_steps=3, **fields)
    fields |= {"checkpoint.resume": "true"}
    parts = train(desk, tmp_path / "parts", max_steps=6, **fields)
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    assert parts[-1]["num_tokens"] == whole[-1]["num_tokens"]


@pytest.mark.slow
def test_an_adapter_and_a_classifier_learn(desk, tmp_path):
    metrics = train(desk, tmp_path / "lora", max_steps=100, **{"policy.lora.rank": 8})
    assert held_out(metrics, "accuracy")[-1] > 0.9
    assert (tmp_path / "lora/out/final/model.safetensors").exists()
    metrics = train(desk, tmp_path / "topics", "topics", max_steps=60)
    assert held_out(metrics, "accuracy")[-1] > 0.9
    config = open_classifier(tmp_path / "topics/out/final").config
    assert config.id2label[1] == "parcel"
    assert config.problem_type == "single_label_classification"


@pytest.mark.slow
def test_grpo_learns_from_the_reward_model(desk, tmp_path):
    train(desk, tmp_path / "reward", max_steps=75)
    answers = {"model.path": desk / "model", "data.dataset": desk / "answers.jsonl"}
    run(tmp_path / "sft", "sft", "warm_start", **answers)
    fields = {
        "model.path": tmp_path / "sft/out/final",
        "reward.reward_model": tmp_path / "reward/out/final",
        "data.dataset": desk / "prompts.jsonl",
        "data.val_dataset": desk / "prompts_held_out.jsonl",
    }
    rewards = held_out(run(tmp_path / "grpo", "grpo", "grpo", max_steps=20, **fields), "reward")
    assert rewards[-1] > rewards[0] + 0.5
