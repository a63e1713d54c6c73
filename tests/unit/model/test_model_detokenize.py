"""What rewards and people read of sampled tokens."""

import pytest
from data_cases import chat_tokenizer

from rlsys.model.detokenize import Detokenizer
from rlsys.rewards import orms

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SAMPLED = "<think>1 + 2</think> <answer>3</answer>"


@pytest.fixture(scope="module")
def tokenizer():
    """Tags are special tokens, as in the tokenizers of several reasoning models."""
    tokenizer = chat_tokenizer("{{ messages[0]['content'] }}")
    tokenizer.add_tokens([*TAGS, "<|im_start|>", "<pad>", "<end>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return tokenizer


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        ("auto", SAMPLED + "<|im_start|>"),
        (True, "1 + 2 3"),
        (False, f"<s>{SAMPLED}<|im_start|><pad></s><end>"),
    ],
)
def test_tags_stay_and_tokens_with_a_role_go(tokenizer, skip, expected):
    sampled = ids(tokenizer, f"<s>{SAMPLED}<|im_start|><pad></s><end>")
    [end] = ids(tokenizer, "<end>")
    assert Detokenizer(tokenizer, skip, [end]).text(sampled) == expected


def test_the_format_reward_sees_tags_that_are_special_tokens(tokenizer):
    text = Detokenizer(tokenizer, "auto").text(ids(tokenizer, SAMPLED))
    assert orms["format"]()([text]) == [1.0]


@pytest.mark.parametrize(
    ("skip", "words"), [("auto", "rewards and logs see them"), (True, "will not see <think>")]
)
def test_tags_that_are_special_tokens_are_named(tokenizer, skip, words):
    note = Detokenizer(tokenizer, skip).note()
    assert words in note
    assert all(tag in note for tag in TAGS)
    assert "im_start" not in note
    assert Detokenizer(chat_tokenizer("{{ messages }}"), skip).note() is None
