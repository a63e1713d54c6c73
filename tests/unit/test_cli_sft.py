"""`rlsys sft` on bad input: each is one clear error before Ray starts."""

import json
import sys

import pytest
from config_cases import write_model, write_run, write_sft_run, write_weights

from rlsys import cli
from rlsys.config import SftConfig
from rlsys.config.load import load_config_as, save_config

HELD_OUT = "--data.split_dataset_ratio 0.5"


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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--max_steps null", "max_steps: is missing, and so is num_train_epochs: set one of them"),
        ("--rollout.num_engines 2", "--rollout.num_engines: there is no such field. It is for"),
        ("--data.min_prompt_length 9", "It is for `rlsys grpo`: leave it out of `rlsys sft`."),
        ("--policy.lrr 1", "--policy.lrr: there is no such field. Did you mean 'policy.lr'?"),
        ("--sft.loss_on some", "sft.loss_on = 'some' (command line): should be 'all', 'last' or"),
        ("--eval_steps 5", "eval_steps = 5, but there is nothing to evaluate on"),
        ("--policy.global_batch_size 32", "data.dataset has 20 samples to train on, and a step"),
        (
            "--data.max_length 300",
            "data.max_length = 300 tokens, but model.path",
        ),
        ("--data.streaming true --num_train_epochs 1", "num_train_epochs = 1 needs the number of"),
        ("--data.streaming true --sft.group_by_length true", "needs all samples at once"),
        (
            "--sft.loss_on flag --data.prompt_template {messages}",
            "data.prompt_template makes rows of one prompt and one answer",
        ),
        (f"--data.streaming true {HELD_OUT}", "data.split_dataset_ratio = 0.5 needs all rows"),
        (
            "--policy.max_tokens_per_micro_batch 32",
            "policy.max_tokens_per_micro_batch = 32 does not hold the longest sample",
        ),
        ("--policy.world_size 3", "policy.global_batch_size = 4 cannot be shared equally among 3"),
        ("--model.path /nowhere", "model.path: "),
        ("--data.dataset /nowhere.jsonl", "data.dataset: "),
        ("--policy.lora.target_modules nothing", "nothing matches nothing. Linear layers of this"),
        ("--policy.lora.target_modules []", "names no layer: write all-linear, a list of names"),
        ("--policy.lora.target_modules (q_proj", "is not a regular expression: missing ), unter"),
        ("--policy.freeze_parameters_regex *", "is not a regular expression: nothing to repeat"),
        ("--policy.lora.path nowhere", "there is no folder nowhere on this machine"),
        ("--tracking.report_to nothing", "tracking.report_to"),
    ],
)
def test_words_that_do_not_fit(tmp_path, capsys, words, says):
    text = refused(capsys, "sft", write_sft_run(tmp_path), *words.split())
    assert text.startswith(f"rlsys sft: {tmp_path / 'sft.yaml'} has 1 problem: - ")
    assert says in text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "user", "content": "1?"}]}, "has no turn of the assistant"),
        ({"query": "1?"}, "has no turn of the assistant"),
        ({"texts": "1?"}, "train.jsonl"),
        ({"messages": "1?"}, "train.jsonl, line 1"),
    ],
)
def test_rows_that_teach_nothing(tmp_path, capsys, row, says):
    path = write_sft_run(tmp_path)
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 20)
    text = refused(capsys, "sft", path)
    assert text.startswith(f"rlsys sft: {path} has ")
    assert says in text


def test_a_model_without_a_template_is_refused(tmp_path, capsys):
    path = write_sft_run(tmp_path)
    (tmp_path / "model/chat_template.jinja").unlink()
    assert "chat template" in refused(capsys, "sft", path)


def test_an_adapter_in_place_of_a_model_is_one_problem(tmp_path, capsys):
    path = write_sft_run(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    text = refused(capsys, "sft", path, "--model.path", adapter)
    assert "has 1 problem: - model.path: " in text
    assert "is a LoRA adapter of org/model, not a model" in text


def test_a_config_for_another_command_names_it(tmp_path, capsys):
    grpo, sft = write_run(tmp_path), write_sft_run(tmp_path, sft={})
    text = refused(capsys, "sft", grpo)
    assert "has 1 problem: - it is a config for `rlsys grpo`, with the section reward, " in text
    assert f"run `rlsys grpo {grpo}`" in text
    text = refused(capsys, "grpo", sft)
    assert "has 1 problem: - it is a config for `rlsys sft`, with the section sft, " in text
    assert f"run `rlsys sft {sft}`" in text
    unnamed = write_sft_run(tmp_path)  # nothing in it is of one method alone
    text = refused(capsys, "grpo", unnamed)
    assert "rollout.generation_batch_size: is missing" in text
    assert "only `rlsys grpo` reads (colocated, reward, grpo, eval), and may be for" in text
    assert f"for another command: rlsys sft {unnamed}" in text


def test_a_section_of_grpo_beside_sft_is_named(tmp_path, capsys):
    path = write_sft_run(tmp_path, sft={}, rollout={"num_engines": 1})
    text = refused(capsys, "sft", path)
    assert "has 1 problem: - rollout: there is no such field. It is for `rlsys grpo`" in text


def test_a_config_that_is_missing_is_asked_for(capsys):
    assert "rlsys sft examples/sft/smollm2.yaml --policy.lr 1e-5" in refused(capsys, "sft")
    text = refused(capsys, "sft", "--sft.loss_on", "last")
    assert "CONFIG, a YAML file, should stand before --sft.loss_on" in text
    assert "there is no such field" not in text


def test_the_help_is_about_sft(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["sft", "--help"])
    text = capsys.readouterr().out
    assert "usage: rlsys sft CONFIG" in text
    assert "reward" not in text


def test_a_pasted_command_becomes_fields_of_sft(tmp_path, capsys):
    pasted = (
        "swift sft --model org/model --tuner_type lora --dataset a.jsonl --num_train_epochs 2 "
        "--learning_rate 1e-4 --max_length 512 --per_device_train_batch_size 2"
    )
    text = refused(capsys, "sft", *pasted.split())
    assert "swift sft: leave it out, `rlsys` is the program" in text
    assert "num_train_epochs: 2 data: dataset: - a.jsonl" in text
    assert "rollout" not in text
    text = refused(capsys, "sft", write_sft_run(tmp_path), *pasted.split())
    assert "rlsys explain" in text
    assert "--policy.lr 1e-4" in text


def test_an_evaluation_of_a_supervised_run_asks_for_rewards(tmp_path, capsys):
    config = load_config_as(SftConfig, write_sft_run(tmp_path)).config
    run = tmp_path / "run"
    write_model(run / "final")
    save_config(config, run / "config.yaml")
    text = refused(capsys, "eval", run)
    assert "is a config of `rlsys sft`, without prompts and rewards" in text
    assert "rlsys eval RUN CONFIG" in text
    text = refused(capsys, "eval", run, run / "config.yaml")
    assert "it is a config for `rlsys sft`, with the section sft" in text


def test_an_evaluation_without_a_config_merges_no_adapter(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = str(write_model(tmp_path / "model"))
    values = {"base_model_name_or_path": base, "r": 4, "lora_alpha": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    write_weights(adapter / "adapter_model.safetensors", {})
    assert "CONFIG is missing" in refused(capsys, "eval", adapter)
    assert not (tmp_path / "cache").exists()
