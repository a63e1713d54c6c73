"""`rlsys rewards list` and `try`, as a user calls them."""

import io
import json
import logging
from dataclasses import replace

import pytest
from config_cases import values
from data_cases import TEMPLATE, chat_tokenizer, word_tokenizer
from rich.console import Console
from tracking_cases import make_group

from rlsys import cli
from rlsys.commands.rewards_try import _print_summary, _print_table
from rlsys.config import Config
from rlsys.config.load import save_config
from rlsys.tracking.completions import ABOUT_COMPLETION, completion_rows
from rlsys.types import RewardOutput

pytestmark = pytest.mark.processes

PLUGIN = '''
import os
from rlsys.rewards import ORM, register_reward, trl_style

@register_reward("mine")
class Mine(ORM):
    """Pays for the number. And more that the table leaves out."""

    def __init__(self, bonus: float = 1.0):
        self.bonus = bonus

    def __call__(self, completions, nums, level=None, **columns):
        for text in completions:
            while text == "hang":
                pass
            if text == "raise":
                raise KeyError(text)
        return [self.bonus * nums[0][0] if text else None for text in completions]

@register_reward("mine_trl")
@trl_style
def mine_trl(prompts, completions, completion_ids, **kwargs):
    """Counts tokens."""
    return [float(len(ids)) for ids in completion_ids]
'''


@pytest.fixture
def folder(tmp_path, monkeypatch, forget_registrations):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rlsys(capfd, *words) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    return code, out, err


def lines_with(text: str, word: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if word in line]


@pytest.mark.parametrize("number", [1, 3, 4, 8])
@pytest.mark.parametrize("name", ["own{}", "accuracy_of_{}", "file_of_rewards.py:score_number_{}"])
def test_every_name_and_score_is_whole_on_80_columns(number, name):
    names = [name.format(i) for i in range(number)]
    console = Console(width=80, file=io.StringIO())
    group = make_group(["So I think. " * 20 + "42"] * 2, question="Add up these. " * 20)
    values = [round(-0.1234 - i / 100, 4) for i in range(number)]
    scored = [RewardOutput(0.0, dict(zip(names, values, strict=True))) for _ in range(2)]
    group = replace(group, rewards=scored)
    _print_table([group], names, console)
    _print_summary([group], names, dict.fromkeys(names, 0.5), console)
    table, _, rest = console.file.getvalue().partition("\n\n")
    head, *rows = table.splitlines()
    assert [row.split()[-number:] for row in rows] == [list(map(str, values))] * 2
    assert all("42  " in row for row in rows)  # the completion's end
    if head.split()[2:] != names:
        assert head.split()[2:] == [str(i + 1) for i in range(number)]
        assert all(f"{i + 1}: {name}" in rest.splitlines() for i, name in enumerate(names))
    assert all(len(line.rstrip()) <= 80 for line in [head, *rows] if number < 8)
    for name, value in zip(names, values, strict=True):
        assert [cells[:2] for cells in lines_with(rest, name) if len(cells) > 2] == [
            [name, str(value)]
        ]


def test_the_list_has_name_source_settings_and_columns(folder, capfd):
    code, out, _ = rlsys(capfd, "rewards", "list", "--plugin", "mine.py")
    assert code == 0
    assert "countdown" in out
    assert (
        "mine  mine.py:5\n  Pays for the number.\n  settings: bonus=1.0\n  columns: nums, [level]\n"
    ) in out
    assert "  mine.py:20\n" in out
    assert "Counts tokens. (TRL style)" in out


def test_the_list_shows_alternative_columns_and_cut_defaults_with_both_quotes(folder, capfd):
    words = " ".join(rlsys(capfd, "rewards", "list")[1].split())
    assert words.count("columns: answer or solution ") == 3
    assert (
        "columns: tests or verification_info or input_output or test_list or test, [entry_point] "
    ) in words
    assert "prompt='You grade the answer of an assistant. Judge only how c...', " in words


def test_the_list_goes_on_after_a_class_that_scores_nothing(folder, capfd):
    silent = '\n@register_reward("silent")\nclass Silent(ORM):\n    """Says nothing."""\n'
    (folder / "mine.py").write_text(PLUGIN + silent)
    code, out, _ = rlsys(capfd, "rewards", "list", "--plugin", "mine.py")
    assert code == 0
    assert "class Silent has no method" in " ".join(out.split())
    assert "Counts tokens. (TRL style)" in out


def test_completions_of_a_file_are_scored_and_failures_shown(folder, capfd, caplog):
    rows = [
        {"prompt": "Use 2.", "nums": [2], "completion": "a"},
        {"prompt": "Use 3.", "nums": [3], "completions": ["b b", "hang", "raise", ""]},
    ]
    words = ("--completions", write_rows(folder / "c.jsonl", *rows), "--timeout_s", 1)
    words += ("--params", "{mine: {bonus: 10}}", "--plugin", "mine.py")
    code, out, _ = rlsys(capfd, "rewards", "try", "mine", "mine_trl", *words)
    assert code == 1
    _, *table = out.partition("\n\n")[0].splitlines()
    assert [line.split()[-2:] for line in table] == [
        ["20", "1"],
        ["30", "2"],
        ["timeout", "1"],
        ["error", "1"],
        ["None", "0"],
    ]
    assert table[1].startswith("Use 3.")
    [summary] = [cells for cells in lines_with(out, "timeout, ") if cells[0] == "mine"]
    assert summary[1:] == ["25", "7.071", "1", "1", "timeout,", "1", "error", summary[-1]]
    assert float(summary[-1]) > 0
    assert "KeyError: 'raise'" in caplog.text
    assert "A run would end here (reward.on_error: raise)." in caplog.text
    assert "A run would score the completion 0 (unless reward.on_timeout" in caplog.text
    assert "The completion is scored 0" not in caplog.text


SIZE = """
from rlsys.rewards import register_reward

@register_reward("size")
def size(completions, **columns):
    return [len(completions)] * len(completions)
"""


def test_neighbours_of_one_prompt_are_a_group(folder, capfd):
    (folder / "size.py").write_text(SIZE)
    two, three = {"prompt": "Use it.", "nums": [2]}, {"prompt": "Use it.", "nums": [3]}
    asked = {"messages": [{"role": "user", "content": "Use it."}], "nums": [3]}
    rows = [
        *(two | {"completion": "a", "reward": 1.0}, two | {"completion": "b", "reward": 0.0}),
        *(three | {"completions": ["c", "d"]}, three | {"text": "e"}, asked | {"text": "f"}),
        *({"completion": "g"}, {"completion": "h"}),  # perhaps of other prompts
        *(two | {"completion": "i"}, two | {"completion": "j", "prompt_id": "x"}),
        *(two | {"completion": "k"}, two | {"completion": "l", "prompt_id": "x"}),
    ]
    words = ("--plugin", "size.py", "--completions", write_rows(folder / "c.jsonl", *rows))
    code, out, _ = rlsys(capfd, "rewards", "try", "size", *words)
    assert code == 0
    sizes = dict(line.split()[-2:] for line in out.partition("\n\n")[0].splitlines()[1:])
    groups = {2: "abjl", 4: "cdef", 1: "ghik"}
    assert sizes == {name: str(size) for size, names in groups.items() for name in names}


def test_a_plugin_beside_the_user_shadows_no_module_of_python(folder, capfd):
    code = "from rlsys.rewards import register_reward\nimport math, os, subprocess, sys\n"
    code += "@register_reward('root')\ndef root(completions, **columns):\n"
    code += "    assert 'PYTHONSAFEPATH' not in os.environ\n"
    code += "    return [math.sqrt(4.0)] * len(completions)\n"
    (folder / "math.py").write_text(code)
    rows = write_rows(folder / "c.jsonl", {"completion": "a"})
    code, out, _ = rlsys(
        capfd, "rewards", "try", "root", "--plugin", "math.py", "--completions", rows
    )
    assert code == 0
    assert lines_with(out, "root")[-1][:2] == ["root", "2"]


@pytest.mark.parametrize("by_id", [True, False])
def test_columns_come_from_a_dataset(folder, capfd, by_id):
    write_rows(
        folder / "train.jsonl",
        {"messages": [{"role": "user", "content": "Use 2."}], "nums": [2]},
        {"messages": [{"role": "user", "content": "Use 3."}], "nums": [3]},
    )
    rows = [{"text": "a", "reward": 7.0, "num_tokens": 5}, {"text": "b", "num_tokens": 6}]
    if by_id:  # as a run writes them
        rows = [rows[i] | {"prompt_id": f"train:{number}"} for i, number in ((0, 2), (1, 1))]
    words = ("--completions", write_rows(folder / "c.jsonl", *rows), "--plugin", "mine.py")
    code, out, _ = rlsys(
        capfd, "rewards", "try", "mine", "mine_trl", *words, "--dataset", "train.jsonl"
    )
    assert code == 0
    values = [line.split()[-2:] for line in out.splitlines()[1:3]]
    assert values == ([["3", "5"], ["2", "6"]] if by_id else [["2", "5"], ["3", "6"]])


def test_rows_without_a_prompt_give_their_columns(folder, capfd):
    write_rows(folder / "train.jsonl", {"nums": [2]}, {"nums": [3]})
    path = write_rows(folder / "c.jsonl", {"text": "a"}, {"text": "b"})
    words = ("rewards", "try", "mine", "--plugin", "mine.py", "--completions", path)
    code, out, err = rlsys(capfd, *words, "--dataset", "train.jsonl")
    assert (code, err) == (0, "")
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("train:")] == [
        "2",
        "3",
    ]
    assert "2 of 2 rows of train.jsonl have no prompt" in " ".join(out.split())
    assert "name it with --preprocessor" in " ".join(out.split())
    (folder / "prepare.py").write_text(
        "def double(row):\n    return {'prompt': 'a', 'nums': [2 * n for n in row['nums']]}\n"
    )
    prepare = ("--preprocessor", "prepare.py:double")
    code, out, _ = rlsys(capfd, *words, "--dataset", "train.jsonl", *prepare)
    assert code == 0
    assert "have no prompt" not in out
    assert [line[0] for line in try_table(out)] == ["a", "b"]
    assert [line[-1] for line in try_table(out)] == ["4", "6"]
    code, _, err = rlsys(capfd, *words, *prepare)
    assert code == 2
    assert "--preprocessor is for the rows of --dataset" in err


def test_a_completion_over_the_models_length_logs_no_warning(folder, capfd, caplog):
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 4
    tokenizer.save_pretrained(folder / "model")
    path = write_rows(folder / "c.jsonl", {"text": "a " * 9, "nums": [2]})
    words = ("rewards", "try", "mine", "--plugin", "mine.py", "--completions", path)
    logger = logging.getLogger("transformers")  # its records do not reach the root
    logger.addHandler(caplog.handler)
    try:
        assert rlsys(capfd, *words, "--tokenizer", "model")[0] == 0
    finally:
        logger.removeHandler(caplog.handler)
    assert "indexing errors" not in caplog.text


@pytest.mark.parametrize(
    ("row", "words", "message"),
    [
        ({"answer": "a"}, (), "c.jsonl, line 1: expected one of completion, completions, text"),
        ({"completion": 7}, (), "a completion should be a text, not 7"),
        ({"completion": "a"}, ("--params", "{mine: {bnous: 1}}"), "Did you mean 'bonus'"),
        ({"completion": "a"}, ("--params", "{mien: {bonus: 1}}"), "Did you mean 'mine'"),
        ({"text": "a", "prompt_id": "x"}, ("--dataset", "d.jsonl"), "its first is 'd:1'"),
        ({"completions": []}, (), "holds no completions"),
        ({"completion": "a"}, ("--limit", "0"), "rlsys rewards try: --limit 0 should be 1 or more"),
        ({"completion": "a"}, ("--limit", "-1"), "--limit -1 should be 1 or more"),
        ({"completion": "a"}, ("--timeout_s", "-1"), "--timeout_s -1.0 should be greater than 0"),
        ({"completion": "a"}, ("--timeout_s", "nan"), "--timeout_s nan should be "),
        ({"completion": "a"}, ("--params", "{mine: [}"), "--params '{mine: [}' is not YAML: "),
        ({"completion": "a"}, ("--params", "foo"), "--params 'foo' should be settings by"),
        ({"completion": "a"}, ("--params", "{mine: 1}"), "should be settings by reward function"),
        ({"completion": "a"}, ("--params", "\a"), "is not YAML: unacceptable character"),
        ({"completion": "a"}, ("--completions", "no.jsonl"), "--completions no.jsonl does not ex"),
        ({"completion": "a"}, ("--completions", "."), "--completions . is a folder"),
        ({"completion": "a"}, ("--tokenizer", "/nowhere"), "--tokenizer /nowhere should be a"),
        ({"completion": "a"}, ("--tokenizer", "empty"), "--tokenizer empty cannot be loaded: "),
    ],
)
def test_unusable_input_is_an_error_with_its_place(folder, capfd, row, words, message):
    write_rows(folder / "d.jsonl", {"prompt": "a", "nums": [1]})
    (folder / "empty").mkdir()
    path = write_rows(folder / "c.jsonl", row)
    words = ("try", "mine", "--plugin", "mine.py", "--completions", path, *words)
    code, _, err = rlsys(capfd, "rewards", *words)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_rows_of_one_prompt_id_must_agree(folder, capfd):
    same = {"prompt": "Use it.", "prompt_id": "p", "completion": "a"}
    rows = [same | {"nums": [2]}, same | {"nums": [2], "step": 7}, same | {"nums": [3]}]
    words = ("rewards", "try", "mine", "--plugin", "mine.py", "--completions")
    code, _, err = rlsys(capfd, *words, write_rows(folder / "c.jsonl", *rows))
    assert code == 2
    assert "line 3: prompt_id 'p' stood in an earlier row with another nums" in err
    code, _, _ = rlsys(capfd, *words, write_rows(folder / "c.jsonl", *rows[:2]))
    assert code == 0


def test_the_completions_of_a_run_are_scored_whatever_weights_they_are_of(folder, capfd):
    group = make_group(["<answer>1</answer>", "no"], [1.0, 0.0])
    group.completions[1] = replace(
        group.completions[1], policy_versions=(3, 4), version_starts=(0, 1)
    )
    path = write_rows(folder / "completions.jsonl", *completion_rows(1, group, [0.5, -0.5]))
    code, out, err = rlsys(capfd, "rewards", "try", "format", "--completions", path)
    assert (code, err) == (0, "")
    assert "countdown-0" in out or "Make 25" in out
    assert set(completion_rows(1, group, None)[0]) == (
        ABOUT_COMPLETION - {"extra_columns"} | {"prompt", "text"}
    )


@pytest.mark.parametrize("opened", [True, False])
def test_a_think_tag_that_the_template_opens_counts(folder, capfd, opened):
    template = TEMPLATE.replace("[assistant]", "[assistant] <think>") if opened else TEMPLATE
    chat_tokenizer(template).save_pretrained(folder / "model")
    row = {"prompt": "2 + 2?", "completion": "So</think><answer>4</answer>"}
    path = write_rows(folder / "c.jsonl", row)
    words = ("rewards", "try", "format", "format_soft", "--completions", path)
    code, out, err = rlsys(capfd, *words, "--tokenizer", "model")
    assert (code, err) == (0, "")
    assert try_table(out) == [[str(int(opened))] * 2]
    data = write_rows(folder / "rows.jsonl", {"prompt": "2 + 2?"})
    _, out, _ = rlsys(capfd, *words, "--tokenizer", "model", "--dataset", data)
    assert try_table(out) == [[str(int(opened))] * 2]
    _, out, _ = rlsys(capfd, *words)
    assert "</think> without <think> in 1 of 1 completion." in " ".join(out.split())


@pytest.fixture
def run(folder):
    """A finished run of the plugin, with its data and its model's tokenizer."""
    write_rows(
        folder / "train.jsonl",
        *({"question": f"Use {n}.", "nums": [n], "level": n} for n in (2, 3)),
        {"question": "Use none.", "nums": [4]},
    )
    word_tokenizer().save_pretrained(folder / "model")
    config = Config.model_validate(
        values(
            data={"columns": {"question": "prompt"}},
            reward={
                "reward_funcs": ["mine", "mine_trl"],
                "external_plugins": ["mine.py"],
                "reward_params": {"mine": {"bonus": 2.0}},
            },
        )
    )
    (folder / "run").mkdir()
    save_config(config, folder / "run" / "config.yaml")
    row = {"prompt_id": "train:2", "prompt": "Use 3.", "step": 1, "num_tokens": 3}
    rows = [row | {"text": "a b"}, row | {"text": "c", "length": 1, "extra_columns": ["length"]}]
    write_rows(folder / "run" / "completions.jsonl", *rows)
    write_rows(folder / "run" / "eval_completions.jsonl", row | {"text": "a b"})
    return folder


def try_table(out: str) -> list[list[str]]:
    """The last cells of the rows of the first table."""
    table = out[out.index("prompt ") :].partition("\n\n")[0]
    return [line.split()[-2:] for line in table.splitlines()[1:]]


@pytest.mark.parametrize("names", [(), ("mine", "mine_trl")])
def test_the_runs_own_config_has_data_plugins_settings_and_tokenizer(run, capfd, names):
    words = ("rewards", "try", *names, "--completions", run / "run" / "completions.jsonl")
    code, out, err = rlsys(capfd, *words)
    assert (code, err) == (0, "")
    assert try_table(out) == [["6", "2"], ["6", "1"]]
    for used in ("config.yaml:", "data: train.jsonl", "plugins: mine.py", "{'bonus': 2.0}"):
        assert used in out
    assert "tokenizer: model" in out
    code, out, _ = rlsys(capfd, *words, "--params", "{mine: {bonus: 3}}", "--limit", "1")
    assert try_table(out) == [["9", "2"]]
    code, out, _ = rlsys(
        capfd, "rewards", "try", "mine", "--completions", run / "run" / "eval_completions.jsonl"
    )
    assert code == 1  # nothing is held out, as the config stands
    assert "not used: data: train.jsonl gives no prompt 'train:2' with this config" in out
    (run / "other.jsonl").write_text((run / "train.jsonl").read_text().replace("[3]", "[5]"))
    rows = (run / "run" / "completions.jsonl").read_text().replace("train:2", "other:2")
    (run / "run" / "mine.jsonl").write_text(rows)
    words = ("--completions", run / "run" / "mine.jsonl", "--dataset", "other.jsonl")
    code, out, _ = rlsys(capfd, "rewards", "try", "mine", "mine_trl", *words)
    assert try_table(out) == [["10", "2"], ["10", "1"]]


def test_files_that_are_gone_since_the_run_are_reported_and_the_rest_is_used(run, capfd, caplog):
    for path in (run / "train.jsonl", *(run / "model").iterdir()):
        path.unlink()
    (run / "mine.py").rename(run / "moved.py")
    words = ("rewards", "try", "--completions", run / "run" / "completions.jsonl")
    code, _, err = rlsys(capfd, *words)
    assert code == 2
    assert "unknown reward function 'mine'" in err
    code, out, _ = rlsys(capfd, *words, "--plugin", "moved.py")
    assert code == 1
    assert "not used: plugin mine.py: not a file here" in out
    assert "not used: tokenizer: " in out
    assert "not used: data: " in out
    assert "'train.jsonl' does not exist" in out
    assert "missing a required argument: 'nums'" in caplog.text
    assert try_table(out) == [["error", "3"]] * 2


def test_a_config_that_cannot_be_read_any_more_is_an_error(run, capfd):
    path = run / "run" / "config.yaml"
    path.write_text(path.read_text().replace("max_steps", "max_stepz"))
    words = ("rewards", "try", "mine", "--completions", run / "run" / "completions.jsonl")
    code, _, err = rlsys(capfd, *words)
    assert code == 2
    assert "config.yaml, beside the completions, is of another version of rlsys" in err


def test_without_a_run_the_functions_have_to_be_named(folder, capfd):
    path = write_rows(folder / "c.jsonl", {"completion": "a"})
    code, _, err = rlsys(capfd, "rewards", "try", "--completions", path)
    assert code == 2
    assert "name the reward functions to try" in err


def test_a_missing_column_is_reported(folder, capfd, caplog):
    path = write_rows(folder / "c.jsonl", {"completion": "a", "numbers": [1]})
    words = ("try", "mine", "--plugin", "mine.py", "--completions", path)
    code, out, _ = rlsys(capfd, "rewards", *words)
    assert code == 1
    assert "missing a required argument: 'nums'" in caplog.text
    assert "error" in out
