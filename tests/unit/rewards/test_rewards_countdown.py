"""Countdown: what earns the reward, and what a model or an attacker might try instead."""

import warnings
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rlsys.rewards import orms
from rlsys.rewards.builtin.countdown import is_solution


def score(answer: str, nums: list[int], target: object) -> float:
    [reward] = orms["countdown"]()([f"<answer>{answer}</answer>"], nums=[nums], target=[target])
    return reward


@pytest.mark.parametrize(
    ("answer", "nums", "target"),
    [
        ("(1 + 2) / 3 * 4 = 4", [1, 2, 3, 4], 4),
        ("(1 + 2)\n / 3\n\n * 4\t=\n4\n", [1, 2, 3, 4], 4),
        ("1+2", [2, 1], 3),
        ("8/(3-8/3)", [8, 8, 3, 3], 24),  # only exact fractions get 24 here
        ("1-2", [1, 2], -1),
        ("1-2=-1", [1, 2], -1),
        ("1\u00a0+\u00a02", [1, 2], 3),
        ("7", [7], 7),
        ("-5+15", [5, 15], 10),
        ("- 5 + 15 = 10", [5, 15], 10),
        ("15+(-5)", [5, 15], 10),
        ("-(5-15)", [5, 15], 10),
        ("2*(-5+15)", [2, 5, 15], 20),
        ("-7", [7], -7),
        ("-5+15", [-5, 15], 10),
        ("1+2", [1, 2], "3"),
        ("1+2", [1, 2], 3.0),
        ("1 +" + " " * 10_000 + "2", [1, 2], 3),
        ("(" * 50 + "1+2" + ")" * 50, [1, 2], 3),
    ],
)
def test_right_answers_score_1(answer, nums, target):
    assert score(answer, nums, target) == 1.0


@pytest.mark.parametrize(
    ("answer", "nums", "target"),
    [
        ("3.5", [3, 5], 3),
        ("1.5*2", [1, 5, 2], 3),
        ("2**3", [2, 3], 8),
        ("2* *3", [2, 3], 8),
        ("7//2", [7, 2], 3),
        ("99**99**99", [99, 99, 99], 99),
        ("99**99**99", [99, 99, 99], 99**99),
        ("1+2", [1, 2, 3], 3),
        ("1+2+2", [1, 2], 5),
        ("1+2", [1, 2], 4),
        ("1+2=4", [1, 2], 4),
        ("1+2=4", [1, 2], 3),
        ("1+2=3=3", [1, 2], 3),
        ("3=1+2", [1, 2], 3),
        ("1+2=", [1, 2], 3),
        ("1 2", [12], 12),
        ("1+\n2 3", [1, 23], 24),
        ("-1+2=-1", [1, 2], 1),
        ("-5+15", [5, 15], 20),
        ("-5+15", [5, 5, 15], 5),
        ("--5+15", [5, 15], 20),
        ("15*-5", [5, 15], -75),
        ("5+15", [-5, 15], 20),
        ("+1+2", [1, 2], 3),
        ("1--2", [1, 2], 3),
        ("(1)(2)", [1, 2], 2),
        ("1-(2)3", [1, 2, 3], 2),
        ("()1+2", [1, 2], 3),
        ("1/0", [1, 0], 0),
        ("1/(2-2)", [1, 2, 2], 0),
        ("1_0+2", [1, 0, 2], 12),
        ("0x10", [0, 10], 16),
        ("1e3", [1, 3], 1000),
        ("3 \u00d7 4", [3, 4], 12),
        ("3 x 4", [3, 4], 12),
        ("8 \u00f7 4", [8, 4], 2),
        (r"\frac{8}{4}", [8, 4], 2),
        ("٣+٤", [3, 4], 7),
        ("1+2 # sum", [1, 2], 3),
        ("__import__('os').system('true')", [1, 2], 3),
        ("", [1, 2], 3),
        ("1+2)", [1, 2], 3),
        ("(1+2", [1, 2], 3),
        (")1+2(", [1, 2], 3),
    ],
)
def test_wrong_answers_score_0(answer, nums, target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Python warns about `(1)(2)`; a log must not fill with it
        assert score(answer, nums, target) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 10_000 + "1" + ")" * 10_000,
        "(" * 10_000,
        "-" * 10_000 + "1",
        "1+" * 5_000 + "1",
        "1" * 10_000,
        "1" + "0" * 480,
        "1" + "*99" * 3_333,
        "1=" + "1" * 10_000,
        "<answer>" * 5_000,
        "</answer>" * 5_000,
    ],
    ids=lambda answer: answer[:8],
)
def test_huge_answers_score_0_and_never_crash(answer):
    assert score(answer, [1], 1) == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>1+2</answer>", 1.0),
        ("<think>maybe 1*2</think>\n<answer>1+2 = 3</answer> I am sure.", 1.0),
        ("<answer>1+2</answer><answer>2+1=3</answer>", 1.0),
        ("<answer>1+2</answer><answer>1*2</answer>", 0.0),
        ("<answer>1*2</answer><answer>1+2</answer>", 0.0),
        ("put it in <answer> </answer>: <answer>1+2</answer>", 0.0),
        ("<answer>1+2</answer><answer>", 0.0),
        ("<answer>1+2</answer></answer>", 0.0),
        ("<answer><answer>1+2</answer>", 0.0),
        ("</answer>1+2<answer>", 0.0),
        ("so</answer> <answer>1+2</answer>", 0.0),
        ("<answer>1+2", 0.0),
        ("1+2", 0.0),
        ("", 0.0),
    ],
)
def test_every_answer_of_a_completion_has_to_be_right(completion, expected):
    assert orms["countdown"]()([completion], nums=[[1, 2]], target=[3]) == [expected]


SPACE = st.text(" \n\t", max_size=2)


@st.composite
def valid_expressions(draw) -> tuple[str, list[int], int]:
    """A random expression over random numbers, built together with its exact value."""
    nums = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6))
    pool = [(str(number), Fraction(number)) for number in draw(st.permutations(nums))]
    while len(pool) > 1:
        (left, x), (right, y) = pool.pop(), pool.pop()
        symbol = draw(st.sampled_from("+-*/" if y else "+-*"))
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[symbol]
        parts = ["(", left, symbol, right, ")"]
        text = "".join(draw(SPACE) + part + draw(SPACE) for part in parts)
        pool.insert(draw(st.integers(0, len(pool))), (text, value))
    [(text, value)] = pool
    assume(value.denominator == 1)
    extra = draw(st.integers(0, 3))
    return "(" * extra + text + ")" * extra, nums, int(value)


@given(valid_expressions(), st.booleans(), SPACE)
def test_any_valid_expression_scores_1(problem, with_tail, space):
    text, nums, target = problem
    tail = f"{space}={space}{target}" if with_tail else ""
    assert score(f"{text}{tail}", nums, target) == 1.0
    assert score(f"{text}={target + 1}", nums, target) == 0.0
    assert score(text, nums, target + 1) == 0.0


@given(valid_expressions(), st.data())
def test_a_number_missing_or_used_twice_scores_0(problem, data):
    text, nums, target = problem
    number = data.draw(st.sampled_from(nums))
    fewer = list(nums)
    fewer.remove(number)
    assert score(text, fewer, target) == 0.0
    assert score(text, [*nums, number], target) == 0.0
    assert score(f"{text} + 0*{number}", nums, target) == 0.0


@given(st.text("0123456789+-*/()=. \nx", max_size=40))
def test_any_text_gets_a_verdict(text):
    assert is_solution(f"<answer>{text}</answer>", [1, 2, 3], 6) in (True, False)


def test_response_stands_in_for_a_missing_target():
    reward = orms["countdown"]()
    assert reward(["<answer>1+2</answer>"], nums=[[1, 2]], response=["3"]) == [1.0]
    assert reward(["<answer>1+2</answer>"], nums=[[1, 2]], target=[3], response=["<x>"]) == [1.0]
    with pytest.raises(ValueError, match="needs a dataset column 'target'"):
        reward(["<answer>1+2</answer>"], nums=[[1, 2]])


@pytest.mark.parametrize("target", [None, "four", 2.5, float("nan"), float("inf"), True, [3]])
def test_a_dataset_without_a_whole_target_is_an_error_and_not_a_0(target):
    with pytest.raises(ValueError, match="whole numbers in column 'target'"):
        score("1+2", [1, 2], target)


def test_nums_may_be_texts_and_must_be_whole():
    assert score("1+2", ["1", 2.0], 3) == 1.0
    with pytest.raises(ValueError, match="whole numbers in column 'nums', found 'one'"):
        score("1+2", ["one", 2], 3)
