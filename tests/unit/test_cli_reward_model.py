"""`rlsys reward-model` on bad input: each is one clear error before Ray starts."""

import json
import sys

import pytest
from config_cases import (
    MODEL_SIZES,
    hf_shapes,
    write_model,
    write_reward_model_run,
    write_sft_run,
    write_weights,
)

from rlsys import cli
from rlsys.config import RewardModelConfig
from rlsys.config.load import load_config_as
from rlsys.model.shape import read_model_shape


@pytest.fixture(autouse=True)
def _no_run_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "rlsys.launch", None)


def refused(capsys, *words) -> str:
    """What is printed for a command line that is wrong input."""
    try:
        code = cli.main(list(map(str, words)))
    except SystemExit as error:
        code = error.code
    assert code == cli.WRONG_INPUT
    return " ".join(capsys.readouterr().err.split())


KIND, CLASSES = "--reward_model.problem_type", "single_label_classification"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--max_steps null", "max_steps: is missing, and so is num_train_epochs"),
        ("--reward_model.num_labels 3", "reward_model.num_labels = 3 is for classes"),
        (
            "--reward_model.label_names [a,b]",
            "reward_model.label_names = ['a', 'b'] is for classes",
        ),
        (f"{KIND} pairwise", "reward_model.problem_type = 'pairwise' (command line): should be"),
        ("--policy.global_batch_size 32", "data.dataset has 20 pairs to train on, and a step"),
        ("--policy.world_size 3", "policy.global_batch_size = 4 cannot be shared equally among 3"),
        (
            "--policy.max_tokens_per_micro_batch 100",
            "does not hold both answers of the longest pair, 128 tokens with data.max_length = 64",
        ),
        ("--policy.recompute_logits false", "keeps the logits of a vocabulary, and a score head"),
        ("--data.max_length 300", "data.max_length = 300 tokens, but model.path"),
        ("--data.prompt_template {prompt}", "data.prompt_template makes one text of a row"),
        ("--rollout.num_engines 2", "--rollout.num_engines: there is no such field. It is for"),
        ("--eval_steps 5", "eval_steps = 5, but there is nothing to evaluate on"),
        ("--policy.lora.modules_to_save [nothing]", "nothing matches nothing. There is"),
        ("--num_labels 2", "reward_model.num_labels"),
    ],
)
def test_words_that_do_not_fit(tmp_path, capsys, words, says):
    text = refused(capsys, "reward-model", write_reward_model_run(tmp_path), *words.split())
    assert text.startswith(
        f"rlsys reward-model: {tmp_path / 'reward_model.yaml'} has 1 problem: - "
    )
    assert says in text


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"problem_type": CLASSES}, "needs the number of classes: set reward_model.num_labels"),
        ({"problem_type": CLASSES, "num_labels": 1}, "with one class has nothing to choose"),
        (
            {"problem_type": CLASSES, "num_labels": 3, "label_names": ["a", "b"]},
            "reward_model.num_labels = 3, and reward_model.label_names has 2 (a, b)",
        ),
        ({"problem_type": CLASSES, "label_names": ["a", "a"]}, "label_names has a twice"),
        ({"problem_type": "regression", "label_names": ["a"]}, "names classes, and reward_model"),
        (
            {"problem_type": "regression", "center_rewards_coefficient": 0.1},
            "reward_model.center_rewards_coefficient = 0.1 centres the rewards of pairs",
        ),
    ],
)
def test_sections_that_contradict_themselves(tmp_path, capsys, section, says):
    path = write_reward_model_run(tmp_path, reward_model=section)
    assert says in refused(capsys, "reward-model", path)


PAIR = {"prompt": "1?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "section", "says"),
    [
        (PAIR | {"rejected": "a"}, {}, "line 1: the chosen and the rejected answer are the same"),
        (PAIR | {"margin": "big"}, {}, "line 1: the column 'margin' has 'big': a number is wanted"),
        ({"text": "a", "label": 0}, {}, "has no pairs of answers"),
        (
            {"text": "a", "label": 3},
            {"problem_type": CLASSES, "num_labels": 3},
            "line 1: the column 'label' has the class 3, and the run has 3 classes, 0 to 2: raise "
            "reward_model.num_labels, or correct the row",
        ),
        (
            {"text": "a", "label": "x"},
            {"problem_type": CLASSES, "num_labels": 3},
            "line 1: the column 'label' has 'x': a class is wanted, 0 to 2",
        ),
        (
            {"text": "a", "label": True},
            {"problem_type": "regression"},
            "line 1: the column 'label' has True: a number is wanted",
        ),
        (
            {"text": "a", "label": 1},
            {"problem_type": "multi_label_classification", "num_labels": 3},
            "line 1: the column 'label' is 1: a list of classes (0 to 2) is wanted, [] for none",
        ),
        (PAIR, {"problem_type": "regression"}, "has no column 'label'"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, capsys, row, section, says):
    path = write_reward_model_run(tmp_path, reward_model=section)
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 20)
    text = refused(capsys, "reward-model", path)
    assert text.startswith(f"rlsys reward-model: {path} has ")
    assert says in text


def test_a_head_with_other_outputs_is_refused(tmp_path, capsys):
    path = write_reward_model_run(tmp_path)
    folder = tmp_path / "model"
    write_weights(folder / "model.safetensors", hf_shapes(folder) | {"score.weight": (3, 64)})
    text = refused(capsys, "reward-model", path)
    assert "the score head has 3 outputs, and the run trains 1: set reward_model.num_labels" in text


def test_classes_of_a_head_in_another_order_are_refused(tmp_path, capsys):
    section = {"problem_type": CLASSES, "label_names": ["good", "bad"]}
    path = write_reward_model_run(tmp_path, reward_model=section)
    (tmp_path / "train.jsonl").write_text((json.dumps({"text": "a", "label": 0}) + "\n") * 20)
    names = {"id2label": {"0": "bad", "1": "good"}}
    write_model(tmp_path / "model", architectures=["Qwen3ForSequenceClassification"], **names)
    text = refused(capsys, "reward-model", path)
    assert "reward_model.label_names = [good, bad], and the score head of model.path" in text
    assert "has the classes [bad, good]: name the same ones in the same order" in text


def test_a_model_that_transformers_has_no_classifier_of_is_refused(tmp_path, capsys):
    path = write_reward_model_run(tmp_path)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"model_type": "glm4_moe"}))
    text = refused(capsys, "reward-model", path)
    assert "transformers has no sequence classifier of model_type 'glm4_moe'" in text


def test_texts_beyond_the_switch_of_longrope_are_refused(tmp_path, capsys):
    path = write_reward_model_run(tmp_path)
    half = [1.0] * (MODEL_SIZES["head_dim"] // 2)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": half,
        "long_factor": half,
        "original_max_position_embeddings": 32,
    }
    sizes = {"model_type": "phi3", "rope_parameters": rope, "architectures": None}
    write_model(tmp_path / "model", **sizes, original_max_position_embeddings=32)
    text = refused(capsys, "reward-model", path)
    assert "in batches with a text over 32 tokens" in text
    assert "set data.max_length to 32 or fewer" in text


def test_a_classifier_is_no_language_model(tmp_path, capsys):
    path = write_sft_run(tmp_path)
    write_model(tmp_path / "model", architectures=["Qwen3ForSequenceClassification"])
    assert "architectures = ['Qwen3ForSequenceClassification']" in refused(capsys, "sft", path)
    shape = read_model_shape(tmp_path / "model", num_labels=2)
    assert (shape.num_labels, shape.tied) == (2, False)


def test_a_config_of_another_command_names_it(tmp_path, capsys):
    path = write_reward_model_run(tmp_path)
    text = refused(capsys, "sft", path)
    assert "it is a config for `rlsys reward-model`, with the section reward_model" in text
    text = refused(capsys, "reward-model", write_sft_run(tmp_path, sft={}))
    assert "it is a config for `rlsys sft`, with the section sft" in text


def test_the_best_model_of_an_adapter_would_be_an_adapter(tmp_path, capsys):
    path = write_reward_model_run(
        tmp_path,
        policy={"lora": {}},
        checkpoint={"load_best_model_at_end": True, "metric_for_best_model": "eval/accuracy"},
        data={"split_dataset_ratio": 0.5},
        eval_steps=5,
    )
    assert "would make the final model an adapter" in refused(capsys, "reward-model", path)


def test_lora_trains_the_head_whole(tmp_path):
    path = write_reward_model_run(tmp_path, policy={"lora": {"modules_to_save": ["norm"]}})
    config = load_config_as(RewardModelConfig, path).config
    assert config.policy.lora.modules_to_save == ["norm", "score"]


def test_a_pasted_command_becomes_fields(tmp_path, capsys):
    pasted = (
        "swift rlhf --rlhf_type rm --model org/model --dataset a.jsonl --num_train_epochs 2 "
        "--learning_rate 1e-4 --center_rewards_coefficient 0.01"
    )
    text = refused(capsys, "reward-model", *pasted.split())
    assert "center_rewards_coefficient: 0.01" in text
    assert "lr: 0.0001" in text or "lr: 1e-4" in text or "lr: 1.0e-4" in text


def test_the_help_names_the_example(capsys):
    text = refused(capsys, "reward-model")
    assert "rlsys reward-model examples/reward_model/reward_model.yaml" in text
