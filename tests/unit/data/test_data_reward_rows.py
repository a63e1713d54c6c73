"""Rows that a reward could not score are found before the run, all of them, with their lines."""

import pytest
from data_cases import word_tokenizer, write_jsonl

from rlsys.config import DataConfig, RewardConfig
from rlsys.data import load_prompts
from rlsys.data.sources import raise_if_any
from rlsys.rewards import ORM, RewardError, orms, register_reward
from rlsys.rewards.columns import row_check

SCHEMA = {"type": "object"}

pytestmark = pytest.mark.usefixtures("forget_registrations")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def load(tokenizer, source, *names, params=None, **options):
    check = row_check(names, params or {}, {"max_completion_length": 9})
    config = DataConfig(dataset=[str(source)], **options)
    return load_prompts(config, tokenizer, seed=0, check=check)


@pytest.mark.parametrize(
    ("name", "params", "good", "bad", "says"),
    [
        ("countdown", {}, {"nums": [1], "target": "2"}, {"nums": [1], "target": 2.5}, "'target'"),
        ("countdown", {}, {"nums": [1], "response": 1}, {"nums": None, "response": 1}, "'nums'"),
        ("accuracy", {}, {"answer": "#### 7"}, {"answer": "#### "}, "must not be empty"),
        ("accuracy", {}, {"solution": 7}, {"solution": [7]}, "must be text or a number"),
        ("cosine", {}, {"solution": "7"}, {"solution": None}, "must be text or a number"),
        ("multiple_choice", {}, {"answer": "(b)"}, {"answer": "Paris"}, "one of ABC"),
        ("multiple_choice", {"choices": "AB"}, {"answer": "b"}, {"answer": "C"}, "one of AB,"),
        ("exact_match", {}, {"answer": ["a", "b"]}, {"answer": ["a", ""]}, "none of them empty"),
        ("exact_match", {"column": "x"}, {"x": 3}, {"x": None}, "a text or a list"),
        ("regex_match", {}, {"pattern": "a+"}, {"pattern": "(a"}, "not a regular expression"),
        ("regex_match", {}, {"pattern": "a+"}, {"pattern": 3}, "must be a text"),
        ("json_schema", {}, {"schema": SCHEMA}, {"schema": {"type": "objekt"}}, "objekt"),
        ("json_schema", {}, {"schema": "{}"}, {"schema": "{"}, "not a usable JSON schema"),
        ("json_match", {}, {"expected": {"a": 1}}, {"expected": "[]"}, "'expected' must be an obj"),
        ("code", {}, {"tests": "assert f() == 1"}, {"tests": "f()"}, "a test without an assert"),
        (
            "code",
            {},
            {"input_output": [{"input": "", "output": "1"}]},
            {"input_output": []},
            "no t",
        ),
        ("language_consistency", {}, {"language": "fr"}, {"language": "xx"}, "language 'xx'"),
    ],
)
def test_built_in_rewards_refuse_what_they_could_not_score(
    tokenizer, tmp_path, name, params, good, bad, says
):
    rows = [{"prompt": "a"} | row for row in (good, bad, good)]
    source = write_jsonl(tmp_path / "train.jsonl", rows)
    [problem] = load(tokenizer, source, name, params={name: params}).refused
    assert problem.text.startswith(f"{source}, line 2: reward function {name!r}: ")
    assert says in problem.text


@pytest.mark.parametrize("name", ["accuracy", "countdown", "code", "regex_match", "json_schema"])
def test_a_column_that_no_row_has_is_reported_once(tokenizer, tmp_path, name):
    rows = [{"prompt": c, "nums": [1], "other": 1} for c in "abc"]
    [problem] = load(tokenizer, write_jsonl(tmp_path / "a.jsonl", rows), name).refused
    assert problem.text.startswith(f"every row: reward function {name!r}: ")
    assert "column" in problem.text


def test_datasets_may_have_the_answer_in_different_columns(tokenizer, tmp_path):
    rows = [
        {"prompt": "a", "nums": [1], "target": 1, "solution": "1"},
        {"prompt": "b", "nums": [2], "response": "2", "answer": "2"},
        {"prompt": "c", "nums": [3], "other": 3},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    data = load(tokenizer, source, "countdown", "exact_match")
    assert [problem.text.split(":")[0].split()[-1] for problem in data.refused] == ["3", "3"]
    texts = ["<answer>1</answer>", "<answer>2</answer>"]
    for name in ("countdown", "exact_match"):
        columns = [prompt.columns for prompt in data.train[:2]]
        by_name = {key: [column[key] for column in columns] for key in columns[0]}
        assert orms[name]()(texts, **by_name) == [1.0, 1.0]
        assert orms[name]()(texts[::-1], **by_name) == [0.0, 0.0]


def test_a_needed_column_that_is_missing_is_left_to_the_check_of_columns(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "target": 1}])
    assert not load(tokenizer, source, "countdown").refused


def test_all_bad_rows_are_reported_at_once_and_unused_ones_are_not(tokenizer, tmp_path):
    rows = [{"prompt": f"a {n}", "nums": [n, None], "target": n, "answer": ""} for n in range(20)]
    rows[3]["prompt"] = "a " * 100
    rows[4] |= {"nums": [4], "answer": "4"}
    source = write_jsonl(tmp_path / "train.jsonl", rows)
    data = load(tokenizer, f"{source}#40", "countdown", "accuracy", max_prompt_length=50)
    assert len(data.train) == 38
    refused = data.refused
    assert len(refused) == 2 * 18
    lines = [problem.text.split(":")[0].split()[-1] for problem in refused[:8]]
    assert lines == ["1", "1", "2", "2", "3", "3", "6", "6"]
    with pytest.raises(ValueError, match=r"36 problems:(?s:.*)\.\.\. and 26 more"):
        raise_if_any(refused)
    write_jsonl(tmp_path / "train.jsonl", [*rows, {"prompt": ""}])
    with pytest.raises(ValueError, match=r"has no text(?s:.*)line 1: reward function 'countdown'"):
        load(tokenizer, source, "countdown")


def test_many_different_schemas_are_looked_at_as_json_only(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("rlsys.rewards.builtin.json_schema.MAX_CHECKED", 2)
    schemas = [{"title": "a"}, {"title": "b"}, {"type": "objekt"}, "[]", None]
    rows = [{"prompt": "a", "schema": schema} for schema in schemas]
    data = load(tokenizer, write_jsonl(tmp_path / "a.jsonl", rows), "json_schema")
    assert [problem.text.split(":")[0].split()[-1] for problem in data.refused] == ["4", "5"]


def test_functions_and_classes_of_users_may_check_rows(tokenizer, tmp_path):
    made = []

    def even(row):
        if row["n"] % 2:
            raise ValueError("n must be even")

    @register_reward("function")
    def function(completions, n, **columns):
        return n

    function.check_row = even

    @register_reward("static")
    class Static(ORM):
        check_row = staticmethod(even)

        def __init__(self):
            made.append("static")

        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

    @register_reward("instance")
    class Instance(ORM):
        def __init__(self, limit: int):
            made.append("instance")
            self.limit = limit

        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

        def check_row(self, row):
            if row["n"] > self.limit:
                raise ValueError(f"n must be at most {self.limit}")

    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "n": n} for n in (2, 3, 4)])
    names = ("function", "static", "instance")
    data = load(tokenizer, source, *names, params={"instance": {"limit": 3}})
    assert [problem.text.partition("a.jsonl, ")[2] for problem in data.refused] == [
        "line 2: reward function 'function': n must be even",
        "line 2: reward function 'static': n must be even",
        "line 3: reward function 'instance': n must be at most 3",
    ]
    assert made == ["instance"]


def test_only_functions_that_score_every_row_and_end_a_run_refuse_rows():
    names = {"reward_funcs": ["format", "accuracy"]}
    assert RewardConfig(**names).names_that_check_rows == ["format", "accuracy"]
    gated = RewardConfig(**names, gate={"accuracy": "format"})
    assert gated.names_that_check_rows == ["format"]
    assert RewardConfig(**names, on_error="zero").names_that_check_rows == []


def test_cosine_says_which_column_its_correctness_needs(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "target": 3}])
    params = {"cosine": {"correctness": "countdown"}}
    data = load(tokenizer, source, "cosine", params=params)
    with pytest.raises(ValueError, match="'countdown', which needs the column 'nums'"):
        raise_if_any(data.refused)


def test_a_check_that_is_broken_itself_says_so(tokenizer, tmp_path):
    @register_reward("broken")
    def broken(completions, **columns):
        return [0.0] * len(completions)

    broken.check_row = lambda row: row["no such"]
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "n": 1}])
    with pytest.raises(RewardError, match=r"check_row of .*'broken' raised KeyError(?s:.*)'n': 1"):
        load(tokenizer, source, "broken")
