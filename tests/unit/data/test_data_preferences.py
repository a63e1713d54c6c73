"""Rows of preference training: the formats of TRL and ms-swift, exact targets, bad rows by name."""

import json

import numpy as np
import pytest
from answer_templates import TEMPLATES, tokenizer_of, unmarked
from data_cases import assistant, user, write_jsonl

from rlsys.config import PreferenceDataConfig
from rlsys.data.preferences import load_preferences
from rlsys.data.streams.make import make_stream

PAIR = {"prompt": "1 + 1?", "chosen": "Two", "rejected": "Three"}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(unmarked(TEMPLATES["qwen3"]))


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(*rows, is_paired=True, **options):
        source = write_jsonl(tmp_path / "a.jsonl", list(rows))
        options = {"shuffle": False, "max_length": 500} | options
        config = PreferenceDataConfig(dataset=[source], **options)
        return load_preferences(config, tokenizer, is_paired=is_paired, seed=0, vocab_size=None)

    return load


def trained(tokenizer, sample):
    return tokenizer.decode(sample.token_ids[sample.target_mask])


def shown(tokenizer, sample):
    return tokenizer.decode(sample.token_ids[~sample.target_mask])


END = "<|im_end|>"
FORMATS = {
    "TRL, texts": PAIR,
    "TRL, turns": {
        "prompt": user("1 + 1?"),
        "chosen": assistant("Two"),
        "rejected": assistant("Three"),
    },
    "TRL, implicit prompt": {
        "chosen": [*user("1 + 1?"), *assistant("Two")],
        "rejected": [*user("1 + 1?"), *assistant("Three")],
    },
    "TRL, turns as JSON": {
        "prompt": json.dumps(user("1 + 1?")),
        "chosen": json.dumps(assistant("Two")),
        "rejected": json.dumps(assistant("Three")),
    },
    "ms-swift": {
        "messages": [*user("1 + 1?"), *assistant("Two")],
        "rejected_response": "Three",
    },
    "ms-swift, conversations": {
        "messages": [*user("1 + 1?"), *assistant("Two")],
        "rejected_messages": [*user("1 + 1?"), *assistant("Three")],
    },
    "ms-swift, query": {"query": "1 + 1?", "response": "Two", "rejected_response": "Three"},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "1 + 1?"}],
        "chosen": {"from": "gpt", "value": "Two"},
        "rejected": {"from": "gpt", "value": "Three"},
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read_alike(load, tokenizer, name):
    data = load(FORMATS[name])
    [row] = data.train
    chosen, rejected = row.answers
    assert row.is_chosen == (True, False)
    assert trained(tokenizer, chosen) == "<think>\n\n</think>\n\nTwo" + END
    assert trained(tokenizer, rejected) == "<think>\n\n</think>\n\nThree" + END
    assert shown(tokenizer, chosen) == shown(tokenizer, rejected)
    assert "1 + 1?" in shown(tokenizer, chosen)
    assert not any("is not read" in notice for notice in data.notices)


def test_only_what_follows_the_prompt_is_trained_on(load, tokenizer):
    talk = [*user("a"), *assistant("b"), *user("c")]
    for row in (
        {"messages": [*talk, *assistant("d")], "rejected_response": "e"},
        {"chosen": [*talk, *assistant("d")], "rejected": [*talk, *assistant("e")]},
        {"prompt": talk, "chosen": "d", "rejected": "e"},
    ):
        [found] = load(row).train
        texts = [trained(tokenizer, sample) for sample in found.answers]
        assert [text.rpartition("\n\n")[2] for text in texts] == ["d" + END, "e" + END], row


def test_a_system_message_stands_before_both_answers(load, tokenizer):
    [row] = load(PAIR, system="Be brief.").train
    assert all("Be brief." in shown(tokenizer, sample) for sample in row.answers)


def test_a_model_without_template_gets_plain_texts(tmp_path, tokenizer):
    plain = tokenizer_of(unmarked(TEMPLATES["qwen3"]))
    plain.chat_template = None
    source = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    config = PreferenceDataConfig(dataset=[source])
    [row] = load_preferences(config, plain, is_paired=True, seed=0).train
    eos = plain.eos_token
    assert [plain.decode(sample.token_ids) for sample in row.answers] == [
        "1 + 1?Two" + eos,
        "1 + 1?Three" + eos,
    ]
    assert [trained(plain, sample) for sample in row.answers] == ["Two" + eos, "Three" + eos]


def test_labelled_answers(load, tokenizer):
    rows = [
        {"prompt": "1 + 1?", "completion": "Two", "label": True},
        {"prompt": user("1 + 1?"), "completion": assistant("Three"), "label": False},
        {"messages": [*user("1 + 1?"), *assistant("Three")], "label": False},
        {"query": "1 + 1?", "response": "Two", "label": True},
    ]
    data = load(*rows, is_paired=False)
    assert [row.is_chosen for row in data.train] == [(True,), (False,), (False,), (True,)]
    texts = [trained(tokenizer, row.answers[0]).rpartition("\n\n")[2] for row in data.train]
    assert texts == ["Two" + END, "Three" + END, "Three" + END, "Two" + END]


SYSTEM = {"role": "system", "content": "Be brief."}


def whole(question, answer):
    return [*user(question), *assistant(answer)]


BAD_PAIRS = [
    (PAIR | {"rejected": "Two"}, "answer are the same, 'Two': there is nothing to prefer"),
    (PAIR | {"rejected": "<think>\n\n</think>\n\nTwo"}, "answer become the same tokens"),
    (PAIR | {"rejected": None}, "has no pair of answers: a row needs `chosen` and `rejected`"),
    (PAIR | {"rejected": ""}, "the column 'rejected' is empty"),
    (PAIR | {"rejected": 3}, "the column 'rejected' is not a text: 3"),
    (PAIR | {"prompt": None}, "has no prompt"),
    (PAIR | {"prompt": assistant("a")}, "the prompt ends with a turn of 'assistant'"),
    (PAIR | {"chosen": FORMATS["TRL, implicit prompt"]["chosen"]}, "a whole conversation, and the"),
    ({"messages": user("a"), "rejected_response": "b"}, "does not end with a turn of the assist"),
    (PAIR | {"rejected": user("a")}, "a whole conversation, and the other an answer"),
    (PAIR | {"images": ["a.png"]}, "has images"),
    (
        {"chosen": whole("a", "b"), "rejected": whole("q", "c")},
        "answer different prompts: message 1",
    ),
    (
        {"messages": whole("a", "b"), "rejected_messages": whole("q", "c")},
        "message 1 is a turn of 'user', 'a' in one, and a turn of 'user', 'q' in the other",
    ),
    (
        {"chosen": [SYSTEM, *whole("a", "b")], "rejected": whole("a", "c")},
        "message 1 is a turn of 'system', 'Be brief.' in one",
    ),
    (
        {"messages": whole("a", "b"), "rejected_messages": [SYSTEM | {"content": ""}]},
        "message 1 is a turn of 'user', 'a' in one, and nothing in the other",
    ),
    ({"messages": assistant("b"), "rejected_response": "c"}, "the prompt ends with nothing"),
    (
        {
            "messages": whole("a", "b"),
            "rejected_response": "c",
            "rejected_messages": whole("a", "d"),
        },
        "has answers in rejected_response, rejected_messages, which are not one pair: keep",
    ),
    (
        PAIR | {"rejected_response": "b"},
        "in chosen, rejected, rejected_response, which are not one",
    ),
    (
        {"messages": whole("a", "b"), "chosen": "b", "rejected_response": "c"},
        "in chosen, rejected_response, which are not one pair",
    ),
    (
        {"prompt": "q", "chosen": whole("a", "b"), "rejected": whole("a", "c")},
        "the column 'prompt' has a turn of 'user', 'q', which is not in chosen: chosen",
    ),
    (
        {"messages": whole("a", "z"), "chosen": whole("a", "b"), "rejected": whole("a", "c")},
        "the column 'messages' has a turn of 'assistant', 'z', which is not in chosen",
    ),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        "has no prompt, and chosen and rejected are no whole conversations: give the prompt in",
    ),
]


@pytest.mark.parametrize(("row", "says"), BAD_PAIRS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_pairs_are_named(load, row, says):
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: ") as error:
        load(PAIR, row)
    assert says in str(error.value)


LABELLED = {"prompt": "1 + 1?", "completion": "Two", "label": True}


@pytest.mark.parametrize("label", ["true", 1, 0, 0.5, "good", [True]])
def test_labels_that_are_no_booleans_are_named(load, label):
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: the column 'label' is ") as error:
        load(LABELLED, LABELLED | {"label": label}, is_paired=False)
    assert f"{label!r}: true (desirable) or false" in str(error.value)


def test_rows_of_the_other_kind_name_their_losses(load):
    with pytest.raises(ValueError, match=r"Single answers with a `label` are for .*kto"):
        load(LABELLED, LABELLED)
    with pytest.raises(ValueError, match=r"Pairs of answers are for preference.loss_type sigmoid"):
        load(PAIR, PAIR, is_paired=False)


def test_too_long_answers_are_dropped_or_refused(load):
    long = PAIR | {"rejected": "x" * 400}
    data = load(PAIR, long, max_length=100)
    assert len(data.train) == 1
    assert data.counts[0].dropped == {"over data.max_length": 1}
    with pytest.raises(ValueError, match=r"line 2: has an answer of 4.. tokens with its prompt"):
        load(PAIR, long, max_length=100, truncation_strategy="error")
    with pytest.raises(ValueError, match=r"no row of .* is left: with their prompts the chosen"):
        load(long, max_length=100)


def test_duplicates_are_pairs_that_agree_in_both_answers(load):
    other = PAIR | {"rejected": "Four"}
    data = load(PAIR, other, PAIR, deduplicate=True)
    assert [row.row_id for row in data.train] == ["a:1", "a:2"]


def test_a_prompt_beside_whole_conversations_repeats_their_turns(load, tokenizer):
    talk = [SYSTEM, *whole("a", "b"), *user("c")]
    both = {"chosen": [*talk, *assistant("d")], "rejected": [*talk, *assistant("e")]}
    for prompt in ({"prompt": " c\n"}, {"prompt": talk}, {"messages": both["chosen"]}):
        data = load(prompt | both)
        [row] = data.train
        texts = [trained(tokenizer, sample).rpartition("\n\n")[2] for sample in row.answers]
        assert texts == ["d" + END, "e" + END], prompt
        assert not any("is not read" in notice for notice in data.notices)


@pytest.mark.parametrize(
    ("is_paired", "row", "unread"),
    [
        (
            True,
            PAIR | {"score": 3, "margin": 2, "label": False, "rejected_response": None},
            {"score", "margin", "label"},
        ),
        (False, LABELLED | {"rejected": "Three"}, {"rejected"}),
    ],
)
def test_unread_columns_are_named(load, is_paired, row, unread):
    notices = " ".join(load(row, is_paired=is_paired).notices)
    assert {name for name in row if f"the column {name!r} is not read" in notices} == unread


def test_streamed_pairs_are_those_in_memory(load):
    rows = [PAIR | {"rejected": f"{n}"} for n in range(5)]
    streamed = load(*rows, streaming=True)
    stream = make_stream(
        PreferenceDataConfig(dataset=["a"], streaming=True, shuffle=False), streamed, seed=0
    )
    for row, other in zip(load(*rows).train, stream.take(5), strict=True):
        assert row.row_id == other.row_id
        for mine, its in zip(row.answers, other.answers, strict=True):
            np.testing.assert_array_equal(mine.token_ids, its.token_ids)
