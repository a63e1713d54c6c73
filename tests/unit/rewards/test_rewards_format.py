import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.rewards import Reward, orms

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def score(completion: str) -> float:
    [reward] = orms["format"]()([completion])
    return reward


@pytest.mark.parametrize(
    "completion",
    [
        "<think>a</think><answer>b</answer>",
        "<think>a</think>\n\n <answer>b</answer>",
        " \n<think>line 1\nline 2</think>\n<answer>\n1 + 2\n= 3\n</answer>\n",
        "<think></think><answer></answer>",
        "<think>a < b > c / d</think><answer>b</answer>",
    ],
)
def test_think_then_answer_scores_1(completion):
    assert score(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "<answer>b</answer>",
        "<think>a</think>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer>",
        "Sure! <think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer> Done.",
        "<think>a</think> so <answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "<think>a<answer>b</answer></think>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think>a</think></think><answer>b</answer>",
        "<think>a</answer></think><answer>b</answer>",
        "<THINK>a</THINK><ANSWER>b</ANSWER>",
    ],
)
def test_anything_else_scores_0(completion):
    assert score(completion) == 0.0


@given(st.text(), st.text(), st.text(" \n\t"), st.text(" \n\t"))
def test_any_content_between_the_tags_scores_1_and_a_repeated_tag_0(thought, answer, gap, edge):
    completion = f"{edge}<think>{thought}</think>{gap}<answer>{answer}</answer>{edge}"
    assert score(completion) == 1.0
    for tag in TAGS:
        assert score(completion.replace(tag, tag * 2)) == 0.0
        assert score(completion.replace(tag, "")) == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("Sure! <think>a</think> so <answer>b</answer> Done.", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer></think>b</answer>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_soft_format_allows_text_around_the_parts(completion, expected):
    assert orms["format_soft"]()([completion]) == [expected]


@pytest.mark.parametrize("name", ["format", "format_soft"])
def test_a_prompt_may_open_the_think_tag(name):
    reward = orms[name](prompt_opens_think=True)
    texts = ["a</think><answer>b</answer>", "<think>a</think><answer>b</answer>"]
    assert reward(texts) == [1.0, 0.0]


def test_a_prompt_that_opens_the_think_tag_is_noticed():
    texts = ["a</think><answer>b</answer>", "<think>a</think><answer>b</answer>"]
    for opens, expected in ((True, [1.0, 0.0]), (False, [0.0, 1.0])):
        columns = {"completions": texts, "prompt_opens_think": [opens] * 2}
        for name in ("format", "format_soft"):
            assert Reward(name).score_columns(columns) == expected
        explicit = Reward("format", {"prompt_opens_think": True})
        assert explicit.score_columns(columns) == [1.0, 0.0]
    with pytest.raises(ValueError, match="must be true, false or auto"):
        orms["format"](prompt_opens_think="yes")


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("exact_match", {"answer": "4"}, "4"),
        ("multiple_choice", {"answer": "B"}, "The answer is B"),
        ("json_match", {"expected": {"a": 1}}, '{"a": 1}'),
        ("trl/think_format_reward", {}, "4"),
    ],
)
def test_a_thought_that_the_prompt_opened_must_end(name, row, answer):
    texts = [f"so</think>{answer}", answer]
    columns = {column: [value] * 2 for column, value in row.items()}
    columns |= {"completions": texts, "prompt_opens_think": [True] * 2}
    assert Reward(name).score_columns(columns) == [1.0, 0.0]
