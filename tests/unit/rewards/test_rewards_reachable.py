"""Rows whose reward nobody could earn are found before a run, and right ones are left alone."""

import pytest
from data_cases import chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from rlsys.model.detokenize import Detokenizer
from rlsys.rewards import ORM, orms
from rlsys.rewards.builtin.countdown import is_correct_answer, solve
from rlsys.rewards.builtin.json_schema import instance_of
from rlsys.rewards.reachable import MAX_ROWS, ReachableRewards, look_at_rows
from rlsys.types import Completion, Prompt

pytestmark = pytest.mark.processes

PROSE = "See Figure 4. The slope is minus two."


def as_it_is(text: str) -> Completion:
    return Completion(list(text.encode()), [], text, "stop", (0,))


def rewards_of(*names: str, write=as_it_is, **params) -> ReachableRewards:
    return ReachableRewards(names, params, {"max_completion_length": 500}, write)


def prompts_of(*rows: dict, opens_think: bool = False) -> list[Prompt]:
    return [Prompt(f"a:{n}", [], [1], row, opens_think) for n, row in enumerate(rows, 1)]


MATH = {"answer": r"\frac{1}{2}"}
COUNTDOWN = {"nums": [44, 19, 35], "target": 98}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"enum": [2, 1]}, "c": {}},
    "required": ["a", "b"],
    "$defs": {"a": {"type": "array", "items": {"type": "string"}, "minItems": 2}},
}


@pytest.fixture(scope="module")
def math_rewards() -> ReachableRewards:
    """One process that imports sympy for the module."""
    return rewards_of("accuracy", "format", "exact_match")


def check_all_earned(rewards: ReachableRewards, row: dict, *, opens_think: bool) -> None:
    [prompt] = prompts_of(row, opens_think=opens_think)
    look = rewards.look(prompt)
    assert look.missed == []
    assert look.completion is not None
    assert not (opens_think and look.completion.startswith("<think>"))
    assert list(look.values) == [reward.name for reward in rewards.rewards]
    assert all(value >= 0 for value in look.values.values())
    assert look_at_rows(rewards, [prompt]) == []


@pytest.mark.parametrize("opens_think", [False, True])
@pytest.mark.parametrize(
    ("names", "row"),
    [
        (["countdown", "format", "soft_overlong"], COUNTDOWN),
        (["multiple_choice", "format_soft"], {"answer": "(b)"}),
        (["json_schema", "format_soft"], {"schema": SCHEMA}),
        (["json_match"], {"expected": {"a": [1, "é"]}}),
        (["exact_match", "trl/think_format_reward"], {"answer": ["Rome", "Roma"]}),
    ],
)
def test_one_completion_earns_the_most_from_all(names, row, opens_think):
    if names[0] == "json_schema":  # whose JSON stands alone, without tags
        names = names[:1]
    check_all_earned(rewards_of(*names), row, opens_think=opens_think)


@pytest.mark.parametrize("answer", [MATH["answer"], "42", r"\$1,250.50", "3 apples"])
@pytest.mark.parametrize("opens_think", [False, True])
def test_answers_of_mathematics_are_earned(math_rewards, answer, opens_think):
    check_all_earned(math_rewards, {"answer": answer}, opens_think=opens_think)


def test_a_reward_that_asks_another_reads_its_answers():
    cosine = rewards_of("cosine", cosine={"correctness": "exact_match"})
    check_all_earned(cosine, {"answer": "Rome"}, opens_think=False)
    assert rewards_of("cosine", cosine={"correctness": "format"}).unknown == ["cosine"]


def test_a_function_without_a_right_answer_wants_only_a_form():
    look = rewards_of("format").look(prompts_of({})[0])
    assert (look.missed, look.completion) == ([], None)


@pytest.mark.parametrize(
    ("name", "params", "row", "words"),
    [
        ("exact_match", {}, {"solution": PROSE}, "finds no right answer"),
        ("exact_match", {}, {"answer": "", "solution": None}, "finds no right answer"),
        ("multiple_choice", {"choices": "AB"}, {"answer": "C"}, "finds no right answer"),
        ("countdown", {}, {"nums": [1, 1, 1], "target": 98}, "from no completion tried"),
        ("countdown", {}, {"nums": [1, "x"], "target": 98}, "finds no right answer"),
        (
            "exact_match",
            {"column": "to"},
            {"to": "a <answer> b"},
            "from no completion tried",
        ),
    ],
)
def test_an_answer_that_nobody_can_give_is_found(name, params, row, words):
    [finding] = look_at_rows(rewards_of(name, **{name: params}), prompts_of(row))
    assert finding.name == name
    assert finding.in_all_rows
    assert finding.kills_reward == ("no completion tried" not in words)
    assert words in finding.text


def test_mathematics_that_cannot_be_read_is_found(math_rewards, caplog):
    rows = [{"answer": "proof"}, {"answer": "4"}, {"answer": None, "solution": PROSE}]
    findings = look_at_rows(math_rewards, prompts_of(*rows))
    assert [finding.text for finding in findings] == [
        "accuracy finds no right answer in 1 of 3 rows (first: a:3)",
        "accuracy says None to the right answer in 1 of 3 rows (first: a:1)",
        "exact_match finds no right answer in 1 of 3 rows (first: a:3)",
    ]
    assert caplog.records == []


def test_all_rows_are_counted_and_the_first_is_named():
    rows = [{"solution": "4"}, {"solution": PROSE}] * (2 * MAX_ROWS)
    [finding] = look_at_rows(rewards_of("exact_match"), prompts_of(*rows))
    assert finding.text == "exact_match finds no right answer in 200 of 400 rows (first: a:2)"
    assert not finding.in_all_rows


def test_what_the_tokenizer_or_the_length_limit_takes_away_is_missed():
    tokenizer = chat_tokenizer("{{ messages }}")
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)

    def write(text, skip=True, limit=500):
        ids = tokenizer.encode(text, add_special_tokens=False)[:limit]
        return Completion(ids, [], Detokenizer(tokenizer, skip).text(ids), "stop", (0,))

    [prompt] = prompts_of({"answer": "a long answer"})
    assert rewards_of("format", "exact_match", write=write).look(prompt).missed == ["format"]
    kept = rewards_of("format", "exact_match", write=lambda text: write(text, "auto"))
    assert kept.look(prompt).missed == []
    short = rewards_of("exact_match", write=lambda text: write(text, "auto", 8))
    assert short.look(prompt).missed == ["exact_match"]


def test_functions_whose_best_value_is_not_known_are_left_out(monkeypatch):
    class Own(ORM):
        max_reward = 2.0

        def gold(self, row):
            return row["word"]

        def __call__(self, completions, word, **columns):
            return [2.0 * (w in text) for text, w in zip(completions, word, strict=True)]

    monkeypatch.setitem(orms.data, "own", Own)
    monkeypatch.setitem(orms.data, "plain", lambda completions, **columns: 1 / 0)
    rewards = rewards_of("own", "plain", "code", "regex_match", regex_match={"pattern": "x"})
    assert rewards.unknown == ["plain", "code", "regex_match"]
    look = rewards.look(prompts_of({"word": "owl"})[0])
    assert (look.golds, look.values, look.missed) == ({"own": "owl"}, {"own": 2.0}, [])
    assert rewards.golds({}) == {"own": None}


@given(
    st.lists(st.tuples(st.integers(1, 25), st.sampled_from("+-*")), min_size=1, max_size=4),
    st.integers(-9, 9),
)
def test_solvable_problems_are_solved(terms, beside):
    nums = [number for number, _ in terms]
    target = nums[0]
    for number, sign in terms[1:]:
        target = {"+": target + number, "-": target - number, "*": target * number}[sign]
    expression, _ = solve(nums, target)
    assert is_correct_answer(expression, nums, target)
    expression, searched_all = solve(nums, target + beside)
    assert searched_all
    assert expression is None or is_correct_answer(expression, nums, target + beside)


def test_countdown_problems_with_a_solution_are_solved():
    for nums, target in (([8, 8, 3, 3], 24), ([-5, 15], 10), ([7], 7), ([1, 2, 3, 4, 5], 120)):
        expression, _ = solve(nums, target)
        assert is_correct_answer(expression, nums, target), expression
    assert solve(list(range(1, 9)), 10**9)[1] is False  # given up


def test_a_guess_at_a_schema_of_any_depth_ends():
    assert instance_of({"$ref": "#/a"}, {"a": {"$ref": "#/a"}}) is None
    assert (
        rewards_of("json_schema").look(prompts_of({"schema": {"pattern": "^x$"}})[0]).missed == []
    )
