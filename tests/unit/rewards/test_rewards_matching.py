"""Choices, texts and patterns: what is accepted, and what a model might try instead."""

import pytest

from rlsys.rewards import orms

pytestmark = pytest.mark.processes


def score(name: str, completion: str, settings: dict | None = None, **columns: object) -> float:
    [value] = orms[name](**settings or {})([completion], **{k: [v] for k, v in columns.items()})
    return value


@pytest.mark.parametrize("gold", ["B", "b", "(B)", "B. Paris", " B) Paris"])
@pytest.mark.parametrize(
    "completion",
    [
        "B",
        " (b) ",
        "B. Paris",
        "**B**",
        "<answer>B</answer>",
        "<think>A or C?</think><answer>(B)</answer>",
        r"\boxed{B}",
        r"\boxed{\text{B}}",
        r"\boxed{A} no, \boxed{B}",
        "The answer is B.",
        "A is wrong, so the answer is (B).",
        "Answer: **B**",
        "**Answer:** B",
        "**Answer**: B",
        r"\boxed{\textbf{(B)}}",
        r"\boxed{\mathrm{B}}",
        "The correct choice is B, because the answer is B",
    ],
)
def test_the_right_choice_scores_1(completion, gold):
    assert score("multiple_choice", completion, solution=gold) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "A",
        "A or B",
        "A, B, C, D",
        "B and A",
        "ABCD",
        "Bananas",
        "BB",
        "<answer>A</answer> B",
        "<answer>A B C D</answer>",
        "<answer>A</answer><answer>B</answer>",
        "<answer>B",
        "The answer is A. The answer is B.",
        r"\boxed{B} or \boxed{A}",
        "<think>the answer is B",
        "<think>B</think>",
        "Be sure that the answer is a city",
        "В",  # noqa: RUF001  Cyrillic
    ],
)
def test_another_or_several_choices_score_0(completion):
    assert score("multiple_choice", completion, solution="B") == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "The answer is A or B.",
        "The answer is (A) or (B).",
        "The answer is **A** or **B**.",
        "The answer is A, B, C and D",
        "The answer is A.B.C.D",
        "The answer is A B C D",
        "(A) or (B)",
        "(a) or (b)",
        "A) or B)",
        "A, B, C and D",
        "A. or B. or C.",
        "A.B.C.D",
        "A. B. C. D.",
        "A/B",
        "<answer>A. or B.</answer>",
        r"\boxed{(A) or (B)}",
        "The wrong choice is A.",
        "The incorrect option: A",
        "Option A is wrong.",
    ],
)
def test_hedging_and_ruling_out_choose_nothing(completion):
    assert score("multiple_choice", completion, solution="A") == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "The answer is B, A is wrong.",
        "The answer is B. A, C and D are wrong.",
        "The answer is B and I am sure.",
        "Option A is wrong, so the answer is B.",
        "The wrong choice is A. The answer is B.",
        "B. Vitamin C.",
        "B. Both A and C",
        "(B) A city or a town",
        "(B). It is the only one.",
        "B) Paris or London",
    ],
)
def test_other_letters_in_a_reason_or_in_the_text_of_a_choice_are_no_hedging(completion):
    assert score("multiple_choice", completion, solution="B") == 1.0


@pytest.mark.parametrize("text", ["The answer is a city", "Answer: a long story", "I'd say so"])
def test_the_words_a_and_i_are_no_choices(text):
    assert score("multiple_choice", text, solution="A") == 0.0
    assert score("multiple_choice", text, solution="I") == 0.0


def test_a_right_answer_that_is_not_a_choice_is_an_error():
    for gold in ("E", "", "1", 2, None):
        with pytest.raises(ValueError, match="must be one of ABCD"):
            score("multiple_choice", "A", {"choices": "ABCD"}, answer=gold)
    with pytest.raises(ValueError, match="needs a dataset column 'answer' or 'solution'"):
        score("multiple_choice", "A")
    with pytest.raises(ValueError, match="two or more letters"):
        orms["multiple_choice"](choices="1234")


@pytest.mark.parametrize(
    ("completion", "gold", "settings"),
    [
        ("Paris", "paris", {}),
        ("  New\n York ", "New York", {}),
        ("<think>Rome?</think> Paris", "Paris", {}),
        ("I say <answer>Paris</answer>!", "Paris", {}),
        (r"I say \boxed{Paris}!", "Paris", {}),
        ("Lyon", ["Paris", "Lyon"], {}),
        ("12", 12, {}),
        ("cafe\u0301", "caf\u00e9", {}),
        ("\uff30aris", "Paris", {}),
        ("STRASSE", "straße", {}),
        ("Paris.", "Paris", {"ignore_punctuation": True}),
    ],
)
def test_equal_texts_score_1(completion, gold, settings):
    assert score("exact_match", completion, settings, solution=gold) == 1.0


@pytest.mark.parametrize(
    ("completion", "gold", "settings"),
    [
        ("", "Paris", {}),
        ("Paris.", "Paris", {}),
        ("Paris or Rome", "Paris", {}),
        ("Paris Rome", ["Paris", "Rome"], {}),
        ("<answer>Paris</answer><answer>Rome</answer>", "Paris", {}),
        ("<answer>Paris", "<answer>Paris", {}),
        ("paris", "Paris", {"ignore_case": False}),
        ("Paris", "Paris", {"answer_format": "tags"}),
        ("<think>Paris", "Paris", {}),
        ("Раris", "Paris", {}),  # noqa: RUF001  Cyrillic
    ],
)
def test_other_texts_score_0(completion, gold, settings):
    assert score("exact_match", completion, settings, solution=gold) == 0.0


@pytest.mark.parametrize("gold", ["", " ", [], ["a", ""], None, {}])
def test_an_empty_right_answer_is_an_error_and_not_a_gift(gold):
    with pytest.raises(ValueError, match="must be a text or a list of texts"):
        score("exact_match", "", solution=gold)


def test_exact_match_reads_the_column_that_is_named():
    assert score("exact_match", "x", {"column": "label"}, label="x", solution="y") == 1.0
    assert score("exact_match", "x", {"column": "answer"}, answer="x", solution="y") == 1.0
    with pytest.raises(ValueError, match="needs a dataset column 'label'"):
        score("exact_match", "x", {"column": "label"}, solution="y")


@pytest.mark.parametrize(
    ("pattern", "mode", "completion", "expected"),
    [
        (r"\d+ apples", "search", "I have 12 apples.", 1.0),
        (r"\d+ apples", "fullmatch", "I have 12 apples.", 0.0),
        (r"I have", "match", "I have 12 apples.", 1.0),
        (r"(?s)^a.b$", "search", "a\nb", 1.0),
        (r"(?i)yes", "search", "YES", 1.0),
        (r"x", "search", "", 0.0),
    ],
)
def test_patterns(pattern, mode, completion, expected):
    assert score("regex_match", completion, {"pattern": pattern, "mode": mode}) == expected
    assert score("regex_match", completion, {"mode": mode}, pattern=pattern) == expected


def test_catastrophic_backtracking_is_stopped_and_scores_0():
    reward = orms["regex_match"](pattern="(a+)+b", time_limit_s=0.2)
    assert reward(["a" * 60, "aab", "a" * 60, "b"]) == [0.0, 1.0, 0.0, 0.0]


def test_invalid_patterns_and_modes_are_refused():
    with pytest.raises(ValueError, match="is not a regular expression"):
        orms["regex_match"](pattern="(")
    with pytest.raises(ValueError, match="is not a regular expression"):
        score("regex_match", "x", pattern="(")
    with pytest.raises(ValueError, match="mode must be"):
        orms["regex_match"](pattern="x", mode="find")
    with pytest.raises(ValueError, match="needs a pattern"):
        score("regex_match", "x")
    with pytest.raises(ValueError, match="time limit"):
        orms["regex_match"](pattern="x", time_limit_s=0)
