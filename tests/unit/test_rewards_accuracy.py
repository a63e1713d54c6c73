"""Accuracy: what is right however it is written, and what a model might try instead."""

import subprocess
import threading

import pytest

from rlsys.rewards import orms
from rlsys.rewards.answers import last_boxed


@pytest.fixture(scope="module")
def accuracy():
    """One helper process for the module: it imports sympy."""
    return orms["accuracy"]()


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("42", r"\boxed{42}"),
        ("42", "The answer is 42."),
        ("42", "40 + 2 = 42"),
        ("42", "<think>41?</think> <answer>42</answer>"),
        ("42", r"<answer>\boxed{42}</answer>"),
        ("42", "<answer>42</answer> again <answer>42</answer>"),
        ("42", "<answer> 42 apples </answer>"),
        ("42", r"\boxed{41}, no: \boxed{42}"),
        ("42", r"\boxed{\boxed{42}}"),
        ("42", r"\boxed{42.0}"),
        ("42", r"\boxed{x = 42}"),
        ("42", r"\boxed{f(2) = 42}"),
        ("42", r"\boxed{40 + 2 = 42}"),
        (42, r"\boxed{42}"),
        (0.5, r"\boxed{\frac{1}{2}}"),
        ("-5", r"\boxed{−5}"),  # noqa: RUF001  a minus sign, not a hyphen
        ("1,234", r"\boxed{1234}"),
        ("1/2", r"\boxed{\frac12}"),
        (r"\frac{1}{3}", r"\boxed{\dfrac{2}{6}}"),
        (r"$\frac12$", "<answer>0.5</answer>"),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
        ("x^2+1", r"\boxed{1 + x^2}"),
        (r"\{1,2\}", r"\boxed{\{2,1\}}"),
        (r"[0,1)", r"\boxed{[0,1)}"),
        (r"\infty", r"\boxed{\infty}"),
        (r"\$18", "She makes $18 every day."),
        ("3 * 24 = <<3*24=72>>72\n#### 72", r"\boxed{72}"),
        ("#### $1,080", r"\boxed{1080}"),
        (r"Thus \boxed{7}.", r"\boxed{7}"),
    ],
)
def test_right_answers_score_1(accuracy, gold, completion):
    assert accuracy([completion], solution=[gold]) == [1.0]


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("42", ""),
        ("42", r"\boxed{}"),
        ("42", r"\boxed{41}"),
        ("42", r"\boxed{42}, no: \boxed{41}"),
        ("42", "<answer>42</answer><answer>41</answer>"),
        ("42", "<answer>41</answer><answer>42</answer>"),
        ("42", "<answer>42"),
        ("42", "42</answer>"),
        ("42", "<answer><answer>42</answer></answer>"),
        ("42", "<think>so 42"),
        ("42", "<think>42</think>"),
        ("42", "<think>42</think> <answer>41</answer>"),
        ("42", r"\boxed{41, 42}"),
        ("42", r"\boxed{41 \text{ or } 42}"),
        ("42", r"\boxed{\{41, 42\}}"),
        ("42", r"\boxed{41 < x < 43}"),
        ("42", r"\boxed{41 = 42}"),
        ("42", r"\boxed{1 = 2 = 42}"),
        ("42", r"\boxed{42 = 41}"),
        ("42", r"\boxed{42 x}"),
        ("42", r"\boxed{٤٢}"),
        ("-5", r"\boxed{5}"),
        (r"2\sqrt{3}", r"\boxed{2}"),
        ("1/3", r"\boxed{0.33}"),
        ("(1,2)", r"\boxed{(2,1)}"),
    ],
)
def test_wrong_answers_score_0(accuracy, gold, completion):
    assert accuracy([completion], solution=[gold]) == [0.0]


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{" * 20_000,
        "}" * 20_000,
        r"\boxed{" + "1" * 100_000 + "}",
        "(" * 1_500 + "1" + ")" * 1_500,
        "<answer>" * 20_000,
        r"\boxed{" + r"\frac{" * 300 + "}",
        "\x00\ud800 \\boxed{1\x00}",
    ],
    ids=lambda text: text[:8].encode("unicode_escape").decode(),
)
def test_huge_or_broken_answers_score_0(accuracy, completion):
    assert accuracy([completion], solution=["42"]) == [0.0]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\infty", r"\infty = \infty"),
        ("3", r"\frac{0}{0}=3"),
        ("4", r"\frac10-\frac10=4"),
        ("4", r"\infty = 4"),
        ("1", r"\infty - \infty = 1 = 1"),
    ],
)
def test_an_equation_of_what_is_no_number_scores_0(accuracy, gold, answer):
    assert accuracy([rf"\boxed{{{answer}}}"], solution=[gold]) == [0.0]


def test_an_answer_at_which_the_comparison_fails_is_wrong(monkeypatch):
    from rlsys.rewards import math_check

    def fail(*args, **kwargs):
        raise TypeError("Invalid NaN comparison")

    monkeypatch.setattr(math_check, "verify", fail)
    assert math_check.check("3", "3", True) is False


def test_what_never_ends_is_stopped_and_the_next_answer_is_right():
    accuracy = orms["accuracy"](time_limit_s=1.5)
    assert accuracy([r"\boxed{99999999!}", r"\boxed{3}"], solution=["3"] * 2) == [0.0, 1.0]


def test_it_works_in_a_thread_where_signals_do_not(accuracy):
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(accuracy([r"\boxed{1}"], solution=[1])))
    thread.start()
    thread.join()
    assert scores == [1.0]


@pytest.mark.parametrize("gold", ["no idea", "???"])
def test_a_row_that_cannot_be_read_does_not_apply_and_is_told_once(accuracy, gold, caplog):
    for _ in range(2):
        assert accuracy(["<answer>1</answer>"] * 2, solution=[gold] * 2) == [None, None]
    assert [gold in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "gold", ["", "   ", "####", "so #### ", "$$", r"\boxed{}", "<answer></answer>"]
)
def test_an_empty_right_answer_is_an_error(accuracy, gold):
    with pytest.raises(ValueError, match="right answer of a row must not be empty, found"):
        accuracy([r"\boxed{1}"], solution=[gold])


def test_only_the_place_that_was_asked_for_counts(accuracy):
    texts = ["42", "<answer>42</answer>", r"\boxed{42}"]
    for where, expected in (
        ("any", [1.0, 1.0, 1.0]),
        ("tags", [0.0, 1.0, 0.0]),
        ("boxed", [0.0, 0.0, 1.0]),
    ):
        assert orms["accuracy"](answer_format=where)(texts, answer=["42"] * 3) == expected
    with pytest.raises(ValueError, match="must be one of any, tags, boxed"):
        orms["accuracy"](answer_format="box")


def test_a_dataset_without_answers_is_an_error(accuracy):
    with pytest.raises(ValueError, match="needs a dataset column 'solution'"):
        accuracy(["1"])
    with pytest.raises(ValueError, match="must be text or a number, found None"):
        accuracy(["1"], solution=[None])


def test_the_helper_process_ends_with_the_reward():
    accuracy = orms["accuracy"]()
    assert accuracy(["1"], solution=["1"]) == [1.0]
    pid = accuracy._check._process.pid
    del accuracy
    assert subprocess.run(["ps", "-p", str(pid)], capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed {a\}b}", r"a\}b"),
        (r"\boxed{\frac{1}{2}} and {}", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed 1", None),
        ("", None),
    ],
)
def test_the_last_box_that_closes(text, expected):
    assert last_boxed(text) == expected
