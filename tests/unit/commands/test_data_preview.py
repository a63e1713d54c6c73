"""`rlsys data preview` as a user sees it."""

import contextlib
import io
import random
import re

import pytest
from config_cases import write_run
from data_cases import TEMPLATE, chat_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from rlsys.cli import main
from rlsys.commands.data_preview import split_rows_option
from rlsys.commands.data_preview_tables import histogram
from rlsys.config.load import load_config
from rlsys.data import preprocessors
from rlsys.preflight.before_start import load_data
from rlsys.rewards import orms


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_a_histogram_holds_every_length_once_in_round_classes(lengths):
    bins = list(histogram(lengths))
    assert sum(number for *_, number in bins) == len(lengths)
    assert len(bins) <= 14
    assert bins[0][2] > 0
    assert bins[-1][2] > 0
    widths = {last - first + 1 for first, last, _ in bins}
    assert len(widths) == 1
    assert str(widths.pop()).rstrip("0") in ("1", "2", "5")
    for first, last, number in bins:
        assert number == sum(first <= length <= last for length in lengths)


def test_the_number_of_rows_may_stand_anywhere_behind_the_config():
    assert split_rows_option(["--seed", "3", "--rows", "5", "--device", "cpu"]) == (
        5,
        ["--seed", "3", "--device", "cpu"],
    )
    assert split_rows_option(["--rows=2"]) == (2, [])
    assert split_rows_option(["--seed", "3"]) == (None, ["--seed", "3"])
    with pytest.raises(ValueError, match="--rows takes a number"):
        split_rows_option(["--rows"])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`rlsys data preview` in a folder with a model that has a real tokenizer."""
    registered = dict(preprocessors.data)
    chat_tokenizer(TEMPLATE).save_pretrained(tmp_path / "tokenizer")
    config = write_run(tmp_path)
    for file in (tmp_path / "tokenizer").iterdir():
        file.replace(tmp_path / "model" / file.name)

    def preview(*overrides, width=120):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("rlsys.commands.console.PIPE_WIDTH", width)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = main(["data", "preview", str(config), *overrides])
        return code, output.getvalue()

    yield preview
    preprocessors.data.clear()
    preprocessors.data.update(registered)


@pytest.fixture
def rows(tmp_path_factory):
    drawing = random.Random(0)
    rows = [
        {"prompt": "a " * drawing.randint(1, 30), "nums": [n], "target": n, "extra": None}
        for n in range(100)
    ]
    last = {"prompt": "b\x1b[31m c", "nums": [1], "target": 1, "extra": "x"}
    # Its path is long, and shorter than 80 characters also in a process of pytest-xdist.
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", [*rows, last])


@pytest.mark.parametrize("width", [80, 120])
def test_everything_is_there_and_fits(run, rows, width):
    code, output = run("--data.dataset", rows, "--data.max_prompt_length", "50", width=width)
    assert code == 0
    assert max(map(len, output.splitlines())) <= width
    assert "<s>[user] a" in output
    assert "rows:6 " in output
    assert rows in output  # no word of a table is cut, however long it is
    assert "over data.max_prompt_length" in " ".join(output.split())
    assert "dropped" in output
    assert "data.max_prompt_length is 50" in output
    table = output[output.index("Columns") :]
    nums = next(line for line in table.splitlines() if line.startswith("nums"))
    assert nums.split() == ["nums", "list", "0", "[1]", "countdown"]
    extra = next(line for line in table.splitlines() if line.startswith("extra"))
    _, kind, missing, example = extra.split()
    assert (kind, example) == ("str", "'x'")
    assert int(missing) > 1
    _, shorter = run("--data.dataset", rows, "--rows", "1", width=width)
    assert shorter.count(" tokens\n") == 1 + 1  # and the heading of the lengths
    assert output.count(" tokens\n") == 3 + 1


def test_a_column_that_no_row_lacks_is_missing_0_times(run, rows):
    _, output = run("--data.dataset", rows)
    line = next(line for line in output.splitlines() if line.startswith("nums"))
    assert line.split()[:3] == ["nums", "list", "0"]
    assert "The reward `format` names no column and gets all of them." in output


def test_a_row_without_a_right_answer_is_shown_once(run, tmp_path):
    rows = [{"prompt": f"a {n}", "answer": n or None} for n in range(4)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    code, output = run("--data.dataset", source, "--reward.reward_funcs", "exact_match")
    assert code == 1
    assert "a.jsonl, line 1: reward function 'exact_match'" in " ".join(output.split())
    assert "finds no right answer" not in output


def test_repeated_prompts_are_counted(run, rows):
    _, output = run("--data.dataset", rows)
    assert re.search(r"\d+ of them repeat an earlier prompt", output)
    assert "repeat an earlier" not in run("--data.dataset", rows, "--data.deduplicate")[1]


def test_what_controls_a_terminal_is_shown_and_not_obeyed(run, rows):
    _, output = run("--data.dataset", rows, "--rows", "101")
    assert "\x1b" not in output


def test_a_missing_column_is_a_problem(run, rows):
    code, output = run("--data.dataset", rows, "--data.columns", "{nums: numbers}")
    assert code == 1
    assert "'countdown' needs the column nums" in output
    assert "numbers" in output


def test_rows_that_a_reward_cannot_score_are_problems(run, tmp_path):
    rows = [{"prompt": "a", "nums": nums, "target": 1} for nums in ([1, "x"], [1])]
    code, output = run("--data.dataset", write_jsonl(tmp_path / "bad.jsonl", rows))
    assert code == 1
    output = " ".join(output.split())
    assert "bad.jsonl, line 1: reward function 'countdown': countdown needs whole" in output
    assert "line 2" not in output
    # A run takes them where the reward may never be called, or where it said what to do.
    gated = ("--reward.reward_funcs", "countdown", "format", "--reward.gate", "{countdown: format}")
    for options in (gated, ("--reward.on_error", "zero")):
        assert run("--data.dataset", str(tmp_path / "bad.jsonl"), *options)[0] == 0


def test_streamed_data_is_looked_at_too(run, rows):
    code, output = run("--data.dataset", rows, "--data.streaming")
    assert code == 0
    assert "Streamed" in output


def test_bad_rows_are_an_error_without_a_traceback(run, tmp_path, capsys):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": ""}])
    assert run("--data.dataset", bad)[0] == 2
    assert "bad.jsonl, line 1: the user message has no text" in capsys.readouterr().err


def test_the_preprocessor_of_the_documentation_runs(run, tmp_path):
    problem = {"question": "Tom has 3. Ann has 4.", "answer": "3 + 4 = 7\n#### 1,007"}
    source = write_jsonl(tmp_path / "gsm.jsonl", [problem] * 40 + [{"question": "?", "answer": ""}])
    code, output = run(
        "--data.dataset", source, "--reward.reward_funcs", "format",
        "--data.max_prompt_length", "200",
        "--data.external_plugins", "plugins/word_problems.py",
        "--data.preprocessor", "word_problems",
    )  # fmt: skip
    assert code == 0
    assert "1 left out by the preprocessor" in " ".join(output.split())
    assert "'1007'" in output


def test_what_prompts_lack_and_nobody_reads_is_named_here_and_at_the_start(run, tmp_path, capsys):
    rows = [
        {"prompt": f"a {word}", "nums": [1], "target": 1, "tools": [{"name": "f"}], "self": 1}
        for word in ("b", "c", "d", "None")
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, output = run("--data.dataset", source, width=200)
    assert code == 0
    load_data(load_config(tmp_path / "run.yaml", ["--data.dataset", source]).config)
    for shown in (output, capsys.readouterr().out):
        assert "chat template leaves out the tools" in shown
        assert f"{source}, line 1 and 3 more" in shown
        assert "a prompt has the word None" in shown
        assert "o reward function names the column self" in shown
    tools = next(line for line in output.splitlines() if line.startswith("tools"))
    assert tools.endswith("chat template")


PROSE = "See Figure 4. The slope is minus two."


def test_right_answers_and_a_completion_that_earns_the_most_are_shown(run, tmp_path):
    rows = [
        {"prompt": "a", "nums": [44, 19, 35], "target": 98, "answer": PROSE, "solution": "Rome"}
    ]
    rows.append({"prompt": "b", "nums": [1, 1], "target": 9, "answer": None, "solution": PROSE})
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    code, output = run(
        "--data.dataset", source,
        "--reward.reward_funcs", "countdown", "format", "exact_match", "regex_match",
        "--reward.reward_params", "{regex_match: {pattern: x}, exact_match: {column: solution}}",
    )  # fmt: skip
    assert code == 0
    assert "countdown reads: 98 of [44, 19, 35]" in output
    assert "exact_match reads: Rome" in output
    assert "a completion that earns" in output
    assert "<answer>35 + (44 + 19)</answer>" in output
    assert "countdown earns 0, below its maximum" in output
    assert "countdown gets its maximum from no completion tried in 1 of 2 rows" in output
    assert "Best value not known, so not checked: regex_match\n" in output


def test_a_class_of_a_plugin_without_a_best_value_is_said_what_it_lacks(run, tmp_path):
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "from rlsys.rewards import ORM, orms\n"
        "class Mine(ORM):\n"
        "    def __call__(self, completions, target, **columns):\n"
        "        return [0.0 for _ in completions]\n"
        "orms['external_countdown'] = Mine\n"
    )
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "target": 9}])
    code, output = run(
        "--data.dataset", source, "--reward.external_plugins", str(plugin),
        "--reward.reward_funcs", "external_countdown",
    )  # fmt: skip
    orms.data.pop("external_countdown")
    assert code == 0
    said = " ".join(output.split())
    assert "Give external_countdown max_reward and gold(row): plugins/README.md" in said


@pytest.mark.parametrize(
    ("rewards", "row", "words"),
    [
        (
            ["exact_match", "format"],
            {"solution": PROSE},
            "finds no right answer in 3 of 3 rows",
        ),
        (
            ["countdown"],
            {"nums": [1, 1], "target": 9},
            "from no completion tried in 3 of 3 rows",
        ),
    ],
)
def test_a_reward_that_no_row_lets_anyone_earn_is_a_problem(run, tmp_path, rewards, row, words):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"} | row] * 3)
    for streaming in ((), ("--data.streaming",)):
        options = ("--data.dataset", source, "--reward.reward_funcs", *rewards, *streaming)
        code, output = run(*options)
        assert code == 1
        assert f"Problem: {rewards[0]}" in output
        assert words in output


def test_a_limit_that_no_answer_fits_into_is_a_problem(run, rows):
    code, output = run("--data.dataset", rows, "--rollout.max_completion_length", "10")
    assert code == 1
    assert re.search(
        r"countdown gets its maximum from no completion tried in (\d+) of \1 rows", output
    )
