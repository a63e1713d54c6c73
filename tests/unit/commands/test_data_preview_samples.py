"""What is trained on is seen, with colours and without."""

import contextlib
import io
import json
import re

import pytest
from answer_templates import TEMPLATES, tokenizer_of, unmarked
from config_cases import write_run
from data_cases import assistant, user, write_jsonl
from rich.console import Console

from rlsys.cli import main
from rlsys.commands.data_preview_samples import (
    marked_parts,
    preview_preferences,
    preview_samples,
)
from rlsys.config import Config, PreferenceDataConfig, SftConfig, SftDataConfig
from rlsys.config.method import schema_of
from rlsys.config.yaml_text import dump_yaml
from rlsys.data.preferences import load_preferences
from rlsys.data.samples import SampleRules, load_samples


@pytest.fixture
def shown(tmp_path):
    """The preview of some rows, and their samples."""
    tokenizer = tokenizer_of(unmarked(TEMPLATES["chatml"]))

    def preview(rows, *, color=None, encoding="utf-8", num_rows=2, rules=None, **options):
        source = write_jsonl(tmp_path / "a.jsonl", rows)
        config = SftDataConfig(dataset=[source], shuffle=False, **options)
        data = load_samples(config, tokenizer, rules or SampleRules(), seed=0)
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding)
        console = Console(
            file=file, width=300, color_system=color, force_terminal=color is not None
        )
        preview_samples(config, data, tokenizer, console, num_rows=num_rows)
        file.flush()
        return raw.getvalue().decode(encoding), data.train, tokenizer

    return preview


ROWS = [
    {"messages": [*user("Hi é"), *assistant("Hello 🙂"), *user("[x]"), *assistant("Bye")]},
    {"query": "a", "response": "b" * 400},
]


def test_trained_parts_stand_between_brackets(shown):
    text, samples, _ = shown(ROWS, max_length=300)
    assert "<|im_start|>assistant\n⟦Hello 🙂<|im_end|>⟧\n" in text
    assert "\n⟦Bye<|im_end|>⟧\n" in text
    assert "Between ⟦ and ⟧ stands what is trained on." in text
    [sample] = samples
    assert f"a:1  {len(sample.token_ids)} tokens, {sample.num_targets} trained on" in text
    assert "1 over data.max_length" in text
    assert "1 sample to train on, 0 to evaluate on." in text
    assert re.search(r"tokens, \d+ of them \(\d+%\) trained on", text)


def test_other_encodings_and_colours(shown):
    text, *_ = shown([{"query": "a", "response": "b"}], encoding="ascii")
    assert "[[b<|im_end|>]]" in text
    text, *_ = shown([{"query": "a", "response": "b"}], color="standard")
    assert "\x1b[32m" in text
    assert "⟦" not in text


def test_parts_are_the_whole_text(shown):
    _, samples, tokenizer = shown(ROWS)
    for sample in samples:
        parts = marked_parts(sample, tokenizer)
        assert "".join(text for text, _ in parts) == tokenizer.decode(sample.token_ids)
        trained = "".join(text for text, is_target in parts if is_target)
        assert trained == tokenizer.decode(sample.token_ids[sample.target_mask])


def test_streams_and_cut_rows(shown):
    text, *_ = shown([{"text": "abc" * 30}], max_length=40, rules=SampleRules("pretrain"))
    assert "; 1 cut" in text
    assert "a:1/0  40 tokens, 39 trained on" in text


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`rlsys data preview` of a config for supervised training, as a user calls it."""
    write_run(tmp_path)
    tokenizer_of(unmarked(TEMPLATES["chatml"])).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("rlsys.commands.console.PIPE_WIDTH", 300)

    def preview(*overrides, rows=ROWS):
        source = write_jsonl(tmp_path / "sft.jsonl", rows)
        config = {"output_dir": "run", "max_steps": 1, "data": {"dataset": [source]}}
        config["model"] = {"path": str(tmp_path / "model")}
        path = tmp_path / "sft.yaml"
        path.write_text(dump_yaml(config))
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(["data", "preview", str(path), *overrides])
        return code, output.getvalue()

    return preview


def test_the_command_shows_a_config_for_supervised_training(command):
    code, text = command("--rows", "1", "--sft.loss_on", "last")
    assert code == 0
    assert "\n⟦Bye<|im_end|>⟧\n" in text
    assert "Hello 🙂<|im_end|>\n" in text
    assert "a:2" not in text
    assert "ends with '<|im_end|>' (id " in text
    assert "rewards" not in text


@pytest.mark.parametrize(
    ("rows", "overrides", "says"),
    [
        ([{"query": "a"}], [], r"sft\.jsonl, line 1: has no turn of the assistant"),
        ([{"query": "a", "response": "{{NAME}}"}], [], r"line 1: has the placeholder \{\{NAME"),
        (ROWS, ["--data.max_prompt_length", "5"], "data.max_prompt_length"),
        (ROWS, ["--sft.loss_on", "some"], "sft.loss_on"),
    ],
)
def test_bad_rows_and_fields_end_the_command_with_an_error(command, rows, overrides, says):
    code, text = command(*overrides, rows=rows)
    assert code == 2
    assert re.search(says, text)


def test_tokens_without_an_embedding_are_named(command, tmp_path):
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 258}))
    code, text = command()
    assert code == 2
    assert re.search(r"line 1: has the token '<\|im_\w+\|>' of id \d+, and the model has", text)


@pytest.mark.parametrize(
    ("content", "words", "schema"),
    [
        ("rollout: {}", [], Config),
        ("data: {}", ["--reward.reward_funcs", "format"], Config),
        ("grpo.beta: 0", [], Config),
        ("data: {}", [], SftConfig),
        ("reference: {}", [], Config),
        ("sft: {}", [], SftConfig),
        ("policy: {}", ["--sft.loss_on=last"], SftConfig),
        ("- 1", [], Config),
        ("a: [", [], Config),
    ],
)
def test_the_sections_of_a_config_say_its_method(content, words, schema, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert schema_of(path, words) is schema
    assert schema_of(tmp_path / "none.yaml") is Config


def test_both_answers_of_a_pair_are_shown(tmp_path):
    tokenizer = tokenizer_of(unmarked(TEMPLATES["chatml"]))
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "1 + 1?", "chosen": "Two", "rejected": "Three"}]
    )
    config = PreferenceDataConfig(dataset=[source], max_length=100)
    data = load_preferences(config, tokenizer, is_paired=True, seed=0)
    file = io.StringIO()
    preview_preferences(config, data, tokenizer, Console(file=file, width=200), num_rows=1)
    text = file.getvalue()
    chosen, rejected = text.partition("\nchosen\n")[2].split("\nrejected\n")
    assert "Two<|im_end|>" in chosen
    assert "Three<|im_end|>" in rejected
    assert chosen.startswith("a:1/chosen  ")
    assert "stands what is trained on" in text
    assert "1 row to train on, 0 to evaluate on." in text


def test_the_command_shows_labelled_answers(command):
    rows = [{"prompt": "a", "completion": f"b{n}", "label": n == 0} for n in range(2)]
    code, text = command("--preference.loss_type", "kto", "--data.shuffle", "false", rows=rows)
    assert code == 0
    assert "\ndesirable\nsft:1  " in text
    assert "\nundesirable\nsft:2  " in text
    assert "ends with '<|im_end|>' (id " in text
