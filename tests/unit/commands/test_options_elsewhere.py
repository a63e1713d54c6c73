"""Options of other projects behind infer, eval and export: each gets what to write here."""

import pytest

from rlsys import cli
from rlsys.commands.options_elsewhere import ELSEWHERE

MCORE = "export swift export --model m --to_mcore true --output_dir o --adapters=a"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            MCORE,
            [
                "5 problems",
                "swift export: leave it out, `rlsys export` is the program",
                "--model: write its value as SOURCE",
                "--to_mcore: write --to mcore",
                "--output_dir: write its value as OUT",
                "--adapters: write its value as SOURCE, and --merge",
            ],
        ),
        ("export m --to hf o --max_shard_sise 1GB", ["Did you mean --max_shard_size?"]),
        ("export m --to hf o --quant_bits 4", ["quantised weights are not written"]),
        ("infer m --max_new_tokens 3 --stream true", ["write --max_tokens", "always streams"]),
        (
            "infer swift infer --model m --stream true --val_dataset d",
            ["swift infer: leave it out", "as MODEL_OR_RUN", "write --prompts FILE --out FILE"],
        ),
        (
            "eval swift eval --model m --eval_limit 5",
            ["swift eval: leave it out", "as MODEL_OR_RUN", "write --data.max_eval_prompts"],
        ),
        ("infer m --nonsense 3", ["--nonsense: there is no such option\n`rlsys infer --help`"]),
        ("infer --val_dataset d m", ["write --prompts FILE --out FILE"]),
        ("eval --model m --eval_dataset gsm8k", ["as MODEL_OR_RUN", "set --data.val_dataset"]),
        ("eval runs/a --temperature 0", ["--temperature: write --eval.temperature"]),
    ],
)
def test_each_foreign_option_is_answered(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words.split())
    error = capsys.readouterr().err
    assert error.startswith(f"rlsys {words.split()[0]}: ")
    assert [text for text in says if text not in error] == []


@pytest.mark.parametrize(
    "words",
    [
        "export ./nowhere --to hf o --dtype=float16 --over",
        "infer ./nowhere --serve --vllm_args --model x",
        "eval ./nowhere c.yaml --eval.temperature 0 --out x",
    ],
)
def test_own_options_and_those_for_vllm_pass(words, capsys):
    assert cli.main(words.split()) == 2
    assert "there is no folder ./nowhere" in capsys.readouterr().err


def test_a_word_too_many_shows_the_usage_of_its_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["infer", "a", "b"])
    assert capsys.readouterr().err.startswith("usage: rlsys infer ")


def test_no_command_has_an_option_that_the_table_calls_foreign():
    commands = next(iter(cli._parser()._subparsers._group_actions)).choices
    for name, table in ELSEWHERE.items():
        own = {option.removeprefix("--") for option in commands[name]._option_string_actions}
        assert not own & set(table)
