"""Row formats that people have: the prompt, and what rewards get of the rest."""

import json

import pytest
from data_cases import assistant, user

from rlsys.data.readers import BadRow
from rlsys.data.rows import parse_row

ASKED = [{"role": "user", "content": "2 + 2?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
EARLIER = [*user("1 + 1?"), *assistant("2")]


@pytest.mark.parametrize(
    ("row", "messages", "columns"),
    [
        pytest.param({"messages": ASKED, "n": 1}, ASKED, {"n": 1}, id="messages"),
        pytest.param(
            {"messages": [*SYSTEM, *EARLIER, *ASKED, *assistant("4")]},
            [*SYSTEM, *EARLIER, *ASKED],
            {"solution": "4"},
            id="messages with an answer",
        ),
        pytest.param(
            {"messages": [*ASKED, *assistant("4")], "solution": "four"},
            ASKED,
            {"solution": "four"},
            id="messages with two answers",
        ),
        pytest.param(
            {"messages": user([{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}])},
            ASKED,
            {},
            id="text in parts",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "gpt", "value": "4"},
                ]
            },
            [*SYSTEM, *ASKED],
            {"solution": "4"},
            id="sharegpt",
        ),
        pytest.param(
            {
                "system": "Be brief.",
                "conversation": [
                    {"human": "1 + 1?", "assistant": "2"},
                    {"human": "2 + 2?", "assistant": "4"},
                ],
            },
            [*SYSTEM, *EARLIER, *ASKED],
            {"solution": "4"},
            id="sharegpt in pairs",
        ),
        pytest.param(
            {"conversations": json.dumps(ASKED)}, ASKED, {}, id="messages in a cell of a CSV"
        ),
        pytest.param(
            {
                "query": "2 + 2?",
                "response": "4",
                "system": "Be brief.",
                "history": [["1 + 1?", "2"]],
            },
            [*SYSTEM, *EARLIER, *ASKED],
            {"response": "4", "solution": "4"},
            id="query-response",
        ),
        pytest.param(
            {"instruction": "2 +", "input": "2?", "output": "4"},
            [{"role": "user", "content": "2 +\n2?"}],
            {"output": "4", "solution": "4"},
            id="alpaca",
        ),
        pytest.param(
            {"instruction": "2 + 2?", "input": "", "output": "4", "history": None},
            ASKED,
            {"output": "4", "solution": "4"},
            id="alpaca without input",
        ),
        pytest.param(
            {"prompt": "2 + 2?", "completion": "4", "answer": 4},
            ASKED,
            {"completion": "4", "answer": 4},
            id="prompt",
        ),
        pytest.param(
            {"prompt": [*SYSTEM, *ASKED], "query": "another", "images": []},
            [*SYSTEM, *ASKED],
            {"query": "another", "images": []},
            id="prompt before query",
        ),
    ],
)
def test_a_format_is_recognised(row, messages, columns):
    parsed = parse_row(row, system=None)
    assert parsed.messages == messages
    assert parsed.columns == columns


def test_a_system_message_of_the_row_goes_before_the_one_of_the_config():
    for row in ({"prompt": "2 + 2?"}, {"query": "2 + 2?"}, {"instruction": "2 + 2?"}):
        assert parse_row(row, system="a").messages[0] == {"role": "system", "content": "a"}
        row["system"] = "b"
        assert parse_row(row, system="a").messages[0] == {"role": "system", "content": "b"}
    own = parse_row({"messages": [*SYSTEM, *ASKED], "system": "b"}, system="a")
    assert own.messages == [*SYSTEM, *ASKED]
    assert own.columns == {}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a"}, "has no prompt: none of messages, conversations"),
        ({"messages": "{"}, "the column 'messages' is a text that is not JSON"),
        ({"messages": [*assistant("a")]}, "the messages end with a turn of 'assistant'"),
        ({"prompt": [*ASKED, *assistant("4")]}, "which TRL would let the model continue"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "a turn is from 'robot'"),
        ({"query": 3}, "the user message has no text but a value"),
        ({"query": "a", "history": ["b"]}, "no list of [query, response]: 'b'"),
        ({"instruction": ["a"]}, "the column 'instruction' is no text"),
        ({"instruction": " ", "input": ""}, "the user message has no text"),
        ({"prompt": "a", "system": 3}, "the column 'system' is no text: 3"),
        ({"prompt": "a", "image": "a.png"}, "has image (the column 'image' is not empty)"),
        ({"messages": user([{"type": "image_url"}])}, "a part of type 'image_url'"),
        ({"prompt": "a", "completions": ["b"]}, "has the column 'completions', a name under which"),
        ({"prompt": "a\ud83d"}, "half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, words):
    with pytest.raises(BadRow) as caught:
        parse_row(row, system=None)
    assert words in str(caught.value)
