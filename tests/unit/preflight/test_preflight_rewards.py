"""Reward functions that are unknown, cannot be called, or lack a column of the data."""

import pytest
from preflight_cases import only, rows

from rlsys.rewards import OWN_COLUMNS, orms
from rlsys.rewards.columns import column_use
from rlsys.rewards.scoring import call_arguments


def test_an_unknown_reward_lists_the_known(problems):
    text = only(problems("--reward.reward_funcs", "countdwn", "format"))
    assert "Did you mean 'countdown'?" in text
    assert "cosine, countdown, exact_match" in text


def test_the_known_rewards_are_listed_once_with_the_option_for_others(problems):
    first, second = problems("--reward.reward_funcs", "countdwn", "nothing")
    assert "For one of your own, name its file in reward.external_plugins" in first.text
    assert second.text == "reward.reward_funcs: unknown reward function 'nothing'."


def test_a_plugin_that_raises_shows_its_traceback(problems, tmp_path):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text("x = 1\nimport nothing_of_this_name\n")
    found = problems("--reward.external_plugins", str(plugin), "--reward.reward_funcs", "mine")
    assert "my_reward.py" in found[0].text
    assert "line 2" in found[0].text
    assert "No module named 'nothing_of_this_name'" in found[0].text
    assert "'mine'" in found[1].text
    assert "plugin above" in found[1].text


def test_a_plugin_makes_its_reward_known(problems, tmp_path):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import register_reward\n"
        "@register_reward('preflight_mine')\n"
        "def mine(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    overrides = ["--reward.external_plugins", str(plugin), "--reward.reward_funcs"]
    assert problems(*overrides, "preflight_mine") == []


HEADS = {
    "def {}(completions):": "unexpected keyword argument",
    "def {}(completions, nums):": "unexpected keyword argument",
    "async def {}(completions, prompts):": "unexpected keyword argument",
    "def {}(completions, /, **columns):": "positional",
    "def {}(completions, **columns):": None,
    "def {}(completions, nums, **columns):": None,
    "def {}(**columns):": None,
    "def {}(completions, max_completion_length, **columns):": None,
    "class {}(ORM):\n def __call__(self, completions):": "unexpected keyword argument",
    "class {}(ORM):\n def __call__(self, **columns):": "too many positional arguments",
    "class {}(ORM):\n def __call__(self, texts, nums, **columns):": None,
    "class {}(ORM):\n @staticmethod\n def __call__(texts, **columns):": None,
    "class {}(ORM):\n @classmethod\n def __call__(cls, texts, **columns):": None,
    "class {}(ORM):\n @classmethod\n def __call__(cls, texts):": "unexpected keyword argument",
    "class {}:\n async def __call__(self, texts, *more, **columns):": None,
    "@trl_style\ndef {}(completions, prompts, **kwargs):": None,
    "@trl_style\ndef {}(completions, prompts):": "unexpected keyword argument",
}
"""Signatures of reward functions, and what is wrong with them."""


@pytest.mark.parametrize(("index", "words"), list(enumerate(HEADS.values())))
def test_a_reward_function_that_cannot_be_called(problems, tmp_path, index, words):
    name = f"preflight_{index}"
    head = list(HEADS)[index].format(name)
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import ORM, register_reward, trl_style\n"
        f"@register_reward({name!r})\n{head} return [0.0] * 4\n"
    )
    found = problems("--reward.external_plugins", str(plugin), "--reward.reward_funcs", name)
    if words is None:
        assert found == []
        return
    text = only(found)
    assert f"reward.reward_funcs: reward function {name!r} cannot be called: " in text
    assert words in text
    assert "end the function's parameters with **columns" in text
    assert not found[0].only_here


@pytest.mark.parametrize("base", ["ORM", "AsyncORM", "object"])
def test_a_reward_class_that_scores_nothing(problems, tmp_path, base):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import ORM, AsyncORM, register_reward\n"
        f"@register_reward('preflight_{base}')\nclass Silent({base}):\n pass\n"
    )
    overrides = ["--reward.external_plugins", str(plugin), "--reward.reward_funcs"]
    text = only(problems(*overrides, f"preflight_{base}"))
    assert "reward.reward_funcs: the reward class Silent has no method __call__(self, comp" in text


def test_every_reward_function_of_rlsys_can_be_called():
    for name, registered in orms.items():
        if registered.__module__.startswith("rlsys.rewards."):  # and no test registered it
            given = {column: [] for column in (*column_use(name).needed, *OWN_COLUMNS)}
            call_arguments(name, registered, given)


@pytest.mark.parametrize(
    ("columns", "data", "missing"),
    [
        ([{"numbers": [1, 1]}], {}, "the column nums, which the data does not have. It has: numb"),
        ([{}], {}, "the column nums, which the data does not have. It has: none besides"),
        ([{"numbers": [1, 1]}], {"columns": {"numbers": "nums"}}, None),
        ([{"nums": [1, 1]}], {"columns": {"nums": "numbers"}}, "the column nums, which"),
        # Another row has it, of which the first rows tell nothing: the others see None.
        ([{}, {"nums": [1, 1]}], {}, None),
        ([{}], {"streaming": True}, "the column nums, which"),
    ],
)
def test_a_column_that_no_dataset_has(problems, tmp_path, columns, data, missing):
    path = rows(tmp_path / "own.jsonl", *columns)
    found = problems(data={"dataset": [path], **data})
    if missing is None:
        assert found == []
    else:
        assert only(found).startswith("reward.reward_funcs: reward function 'countdown' needs")
        assert missing in only(found)
        assert not found[0].only_here


def test_a_setting_of_a_class_is_not_a_column(problems, tmp_path):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import ORM, register_reward\n"
        "@register_reward('preflight_settled')\n"
        "class Settled(ORM):\n"
        " def __init__(self, nums): pass\n"
        " def __call__(self, completions, nums, **columns): return [0.0] * len(completions)\n"
    )
    reward = {
        "external_plugins": [str(plugin)],
        "reward_funcs": ["preflight_settled"],
        "reward_params": {"preflight_settled": {"nums": 3}},
    }
    data = {"dataset": [rows(tmp_path / "own.jsonl", {"target": 2})]}
    text = only(problems(reward=reward, data=data))
    assert "reward function 'preflight_settled' needs the column nums" in text


def test_a_column_that_a_reward_function_does_not_take(problems, tmp_path):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import register_reward\n"
        "@register_reward('preflight_exact')\n"
        f"def exact({', '.join(OWN_COLUMNS)}, nums): return [0.0] * len(completions)\n"
    )
    reward = {"external_plugins": [str(plugin)], "reward_funcs": ["preflight_exact"]}
    fitting = {"dataset": [rows(tmp_path / "own.jsonl", {"nums": [1]})]}
    assert problems(reward=reward, data=fitting) == []
    more = {"dataset": [rows(tmp_path / "more.jsonl", {"nums": [1], "target": 2})]}
    text = only(problems(reward=reward, data=more))
    assert "'preflight_exact' cannot be called: got an unexpected keyword argument 'tar" in text


def test_a_column_may_be_in_another_dataset_and_in_files_of_columns(problems, tmp_path):
    path = rows(tmp_path / "own.jsonl", {})
    table = tmp_path / "own.csv"
    table.write_text("prompt,number\na,1\n")
    assert "It has: number." in only(problems(data={"dataset": [path, str(table)]}))
    table.write_text("prompt,nums\na,1\n")
    assert problems(data={"dataset": [path, str(table)]}) == []


def test_a_column_that_only_held_out_data_lacks(problems, tmp_path):
    data = {"val_dataset": [rows(tmp_path / "own.jsonl", {"target": 2})]}
    assert problems(data=data) == []  # nothing is evaluated
    assert "which the held-out data does not have" in only(problems("--eval_steps", "5", data=data))


def test_columns_that_a_preprocessor_makes(problems, tmp_path):
    plugin = tmp_path / "numbers.py"
    plugin.write_text(
        "from rlsys.data import register_preprocessor\n"
        "@register_preprocessor('preflight_numbers')\n"
        "def numbers(row):\n    return row | {row['name']: [1, 1]}\n"
    )
    plugins = {"external_plugins": [str(plugin)], "preprocessor": ["preflight_numbers"]}
    path = rows(tmp_path / "own.jsonl", {"name": "nums"})
    assert problems(data={"dataset": [path], **plugins}) == []
    path = rows(tmp_path / "own.jsonl", {"name": "numbers"})
    text = only(problems(data={"dataset": [path], **plugins}))
    assert "the column nums, which the data does not have. It has: name, numbers." in text


def test_columns_are_left_to_the_run_if_the_first_rows_do_not_say(problems, tmp_path, monkeypatch):
    monkeypatch.setattr("rlsys.preflight.data.MOST_ROWS", 30)
    short, longer = rows(tmp_path / "a.jsonl", {}, copies=30), rows(tmp_path / "b.jsonl", {}, {})
    assert "the column nums, which" in only(problems(data={"dataset": [short]}))
    assert problems(data={"dataset": [longer]}) == []
    (tmp_path / "folder").mkdir()
    assert problems(data={"dataset": [short, str(tmp_path / "folder")]}) == []
    # A problem of rows is reported alone.
    one_bad = '{"prompt": 3}\n' + '{"prompt": "a"}\n' * 3
    for content, words in ((one_bad, "found 3"), ("", "no rows")):
        (tmp_path / "bad.jsonl").write_text(content)
        assert words in only(problems(data={"dataset": [str(tmp_path / "bad.jsonl")]}))
