"""Rewards of length and repetition, against the equations and TRL's own functions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import (
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
)

from rlsys.rewards import ORM, orms, trl_style

TOKENS = st.lists(st.integers(0, 3), max_size=40)


@pytest.fixture
def is_right():
    """A correctness reward that reads the word right."""

    class IsRight(ORM):
        def __call__(self, completions, **columns):
            return [{"right": 1.0, "wrong": 0.0}.get(text) for text in completions]

    orms["is_right"] = IsRight
    yield "is_right"
    del orms["is_right"]


@given(st.integers(1, 50), st.data())
def test_soft_overlong_is_dapos(limit, data):
    cache = data.draw(st.integers(1, limit))
    ids = data.draw(st.lists(TOKENS, max_size=4))
    mine = orms["soft_overlong"](max_completion_length=limit, cache_length=cache)
    assert mine([""] * len(ids), completion_ids=ids) == pytest.approx(
        get_soft_overlong_punishment(limit, cache)(completion_ids=ids)
    )


def test_soft_overlong_punishes_the_last_fifth_by_default():
    reward = orms["soft_overlong"](max_completion_length=100)
    ids = [[0] * n for n in (0, 80, 90, 100, 101)]
    assert reward([""] * 5, completion_ids=ids) == [0, 0, -0.5, -1, -1]


@given(st.lists(TOKENS, max_size=4), st.integers(1, 5), st.floats(-2, 0))
def test_repetition_penalty_of_tokens_is_trls(ids, size, penalty):
    mine = orms["repetition_penalty"](ngram_size=size, max_penalty=penalty)
    assert mine([""] * len(ids), completion_ids=ids) == pytest.approx(
        get_repetition_penalty_reward(size, penalty)(completion_ids=ids)
    )


def test_repetition_penalty_of_words_ignores_case_and_spaces():
    reward = orms["repetition_penalty"](ngram_size=2, unit="words")
    texts = ["a b c d", "A b\n a  B", "one", ""]
    scores = reward(texts, completion_ids=[[]] * 4)
    assert scores == pytest.approx([0, -1 / 3, 0, 0])


def test_cosine_is_ms_swifts_by_default(is_right):
    reward = orms["cosine"](max_completion_length=100, correctness=is_right)
    texts = ["right"] * 4 + ["wrong"] * 4 + ["neither"]
    ids = [[0] * n for n in (0, 50, 100, 1000)] * 2 + [[]]
    scores = reward(texts, completion_ids=ids)
    assert scores[:8] == pytest.approx([1, 0.75, 0.5, 0.5, -0.5, -0.25, 0, 0])
    assert scores[8] is None


def test_cosine_calls_the_other_reward_as_a_run_does(monkeypatch):
    def by_keyword(prompts, completions, **columns):
        return [float(text in prompt) for prompt, text in zip(prompts, completions, strict=True)]

    @trl_style
    def as_trl(prompts, completions, **columns):
        return [float(reply[-1]["content"] == "a") for reply in completions]

    for name, function in (("by_keyword", by_keyword), ("as_trl", as_trl)):
        monkeypatch.setitem(orms.data, name, function)
        reward = orms["cosine"](max_completion_length=2, correctness=name)
        scores = reward(["a", "b"], completion_ids=[[1, 1]] * 2, prompts=["a", "c"])
        assert scores == pytest.approx([0.5, 0.0])


def test_cosine_refuses_rewards_that_it_cannot_call(monkeypatch):
    async def later(completions, **columns):
        return [1.0] * len(completions)

    monkeypatch.setitem(orms.data, "later", later)
    with pytest.raises(ValueError, match="not async, and 'later' is"):
        orms["cosine"](max_completion_length=9, correctness="later")
    with pytest.raises(ValueError, match="another reward than cosine"):
        orms["cosine"](max_completion_length=9, correctness="cosine")


@given(st.integers(0, 200), st.integers(0, 200))
def test_a_longer_right_answer_never_earns_more(shorter, longer):
    orms.data.setdefault("always", lambda completions, **_: [1.0] * len(completions))
    reward = orms["cosine"](max_completion_length=100, correctness="always")
    short, long = sorted((shorter, longer))
    first, second = reward(["", ""], completion_ids=[[0] * short, [0] * long])
    del orms["always"]
    assert first >= second


@pytest.mark.processes
def test_cosine_of_mathematics_is_trls():
    settings = {"min_len_value_wrong": -1.0, "max_len_value_wrong": -0.5}
    mine = orms["cosine"](100, min_len_value_correct=1.0, max_len_value_correct=0.5, **settings)
    texts = [r"\boxed{1}", r"\boxed{2}"] * 3
    ids = [[0] * n for n in (1, 1, 60, 60, 120, 120)]
    theirs = get_cosine_scaled_reward(100)([[{"content": text}] for text in texts], ["1"] * 6, ids)
    assert mine(texts, completion_ids=ids, solution=["1"] * 6) == pytest.approx(theirs)
    assert math.isclose(theirs[0], mine(texts[:1], completion_ids=ids[:1], solution=["1"])[0])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("soft_overlong", {"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ("soft_overlong", {"max_completion_length": 9, "cache_length": 10}, "must be 1 to"),
        ("cosine", {"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ("cosine", {"max_completion_length": 9, "correctness": "acuracy"}, "Did you mean"),
        ("repetition_penalty", {"ngram_size": 0}, "ngram_size must be at least 1"),
        ("repetition_penalty", {"max_penalty": 1.0}, "must be 0 or less"),
        ("repetition_penalty", {"max_penalty": math.nan}, "must be 0 or less"),
        ("repetition_penalty", {"unit": "letters"}, "must be one of tokens, words, not 'letters'"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        orms[name](**settings)
