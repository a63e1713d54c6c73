import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.rewards import orms


def share(text: str, **settings: str) -> float:
    [value] = orms["language_consistency"](**settings)([text])
    return value


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("The sum is 12 + 30 = 42.", "en", 1.0),
        ("答案是四十二。", "zh", 1.0),
        ("答案 ab", "zh", 0.5),
        ("答案 ab", "en", 0.5),
        ("Ответ: сорок два", "ru", 1.0),
        ("こたえは四十二です", "ja", 1.0),
        ("답은 마흔둘", "ko", 1.0),
        ("答案是 $x_{abc} = 4$ 和 \\frac{1}{2}", "zh", 1.0),
        ("答案\n```python\nprint(42)\n```", "zh", 1.0),
        ("<think>想</think><answer>四</answer>", "zh", 1.0),
        ("", "en", 0.0),
        ("12 + 30 = 42 !!!", "en", 0.0),
        ("\u0430\u0435\u043e\u0440\u0441", "en", 0.0),  # Cyrillic that looks Latin
        ("\U0001d400\U0001d401", "en", 0.0),  # letters of mathematics
    ],
)
def test_share_of_letters_in_the_script(text, language, expected):
    assert share(text, language=language) == expected


@given(st.text())
def test_any_text_has_a_share(text):
    assert 0 <= share(text) <= 1


@pytest.mark.parametrize("text", ["$" * 100_000, "```" * 50_000, "\\[" * 50_000, "<" * 100_000])
def test_unclosed_marks_are_read_once(text):
    assert share(text) == 0.0


def test_the_dataset_may_name_the_language_of_each_row():
    reward = orms["language_consistency"]()
    assert reward(["abc", "四二"], language=["en", "zh"]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="does not know language 'english'"):
        reward(["abc"], language=["english"])
    with pytest.raises(ValueError, match="Known: ar, bg"):
        orms["language_consistency"](language="xx")
