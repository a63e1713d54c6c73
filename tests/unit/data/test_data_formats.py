"""Row formats that people have: the prompt, and what rewards get of the rest."""

import json

import pytest
from data_cases import assistant, parsed, user

from rlsys.json_text import BadRow

ASKED = [{"role": "user", "content": "2 + 2?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
EARLIER = [*user("1 + 1?"), *assistant("2")]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}
SCHEMA = {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}


def calling(content: str = "", *calls: dict) -> dict:
    """A turn that calls functions, as rlsys has it after reading rows without ids."""
    functions = [{"type": "function", "function": call} for call in calls or [CALL["function"]]]
    return {"role": "assistant", "content": content, "tool_calls": functions}


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
    found = parsed(row)
    assert found.messages == messages
    assert found.columns == columns


def test_a_system_message_of_the_row_goes_before_the_one_of_the_config():
    for row in ({"prompt": "2 + 2?"}, {"query": "2 + 2?"}, {"instruction": "2 + 2?"}):
        assert parsed(row, system="a").messages[0] == {"role": "system", "content": "a"}
        row["system"] = "b"
        assert parsed(row, system="a").messages[0] == {"role": "system", "content": "b"}
    own = parsed({"messages": [*SYSTEM, *ASKED], "system": "b"}, system="a")
    assert own.messages == [*SYSTEM, *ASKED]
    assert own.columns == {"system": "b"}  # so that the run names it as unread
    same = {"messages": [*SYSTEM, *ASKED], "system": "Be brief.", "system_prompt": ""}
    assert parsed(same, system="a").columns == {}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a"}, "has no prompt: none of messages, conversations"),
        ({"messages": "{"}, "the column 'messages' is a text that is not JSON"),
        ({"messages": [*assistant("a")]}, "the messages end with a turn of 'assistant'"),
        ({"prompt": [*ASKED, *assistant("4")]}, "which TRL would let the model continue"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "a turn is from 'robot'"),
        ({"query": 3}, "the user message has no text but a value"),
        ({"query": "a", "history": ["b"]}, "not a list of [query, response]: 'b'"),
        ({"instruction": ["a"]}, "the column 'instruction' is not a text"),
        ({"instruction": " ", "input": ""}, "the user message has no text"),
        ({"prompt": "a", "system": 3}, "the column 'system' is not a text: 3"),
        ({"prompt": "a", "image": "a.png"}, "has image (the column 'image' is not empty)"),
        ({"messages": user([{"type": "image_url"}])}, "a part of type 'image_url'"),
        (
            {"messages": user(user("a"))},
            "a part of a message is {'type': 'text', 'text': ...}, fou",
        ),
        ({"prompt": '[{"role": "user", "content": "a"'}, "'prompt' is a text that is not JSON"),
        ({"prompt": '[{"role": "robot", "content": "a"}]'}, "found {'role': 'robot'"),
        (
            {"messages": [*SYSTEM, {"role": "system", "content": "b"}]},
            "end with a turn of 'system'",
        ),
        ({"messages": [{"role": "system", "content": ""}]}, "the messages ask nothing"),
        ({"messages": user([{"type": "text", "text": None}])}, "the user message has no text"),
        ({"messages": user([{"type": "text", "text": 3}])}, "has no text but a value"),
        ({"messages": "[" * 100_000}, "nested too deeply"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}, *ASKED]}, "found 'f(x)'"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "only the assist"),
        ({"prompt": "a", "tools": "hammer"}, "the column 'tools' is a text that is not JSON"),
        ({"prompt": "a", "tools": ["hammer"]}, "has 'hammer'. If it is for rewards only, rename"),
        ({"prompt": "a", "chat_template_kwargs": "[1]"}, "variables of the chat template"),
        ({"prompt": "a", "chat_template_kwargs": {"tokenize": False}}, "which rlsys sets itself"),
        ({"prompt": "a\ud83d"}, "half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, words):
    with pytest.raises(BadRow) as caught:
        parsed(row)
    assert words in str(caught.value)


def openai(**call) -> dict:
    """A turn as OpenAI's API returns it: null for what is not there, arguments as text."""
    nothing = {"refusal": None, "audio": None, "function_call": None}
    given = {"id": "c1", "type": "function", "index": None, "function": {"name": "add", **call}}
    return {"role": "assistant", "content": None, "tool_calls": [given], **nothing}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        pytest.param(
            {"messages": [*ASKED, openai(arguments='{"a": 2}'), RESULT]},
            [*ASKED, CALLING, RESULT],
            id="OpenAI, ends with a tool",
        ),
        pytest.param(
            {"messages": [*ASKED, openai(arguments={"a": 2, "b": None}), RESULT]},
            [
                *ASKED,
                CALLING
                | {
                    "tool_calls": [
                        CALL | {"function": {"name": "add", "arguments": {"a": 2, "b": None}}}
                    ]
                },
                RESULT,
            ],
            id="a null that the row has stays",
        ),
        pytest.param(
            {
                "messages": [
                    *ASKED,
                    {
                        "role": "assistant",
                        "function_call": {"name": "add", "arguments": '{"a": 2}'},
                    },
                    {"role": "function", "name": "add", "content": "4"},
                ]
            },
            [*ASKED, calling(), RESULT | {"name": "add"}],
            id="OpenAI before tools",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                    {"from": "observation", "value": "4"},
                ]
            },
            [*ASKED, calling(), RESULT],
            id="LLaMA-Factory",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {
                        "from": "function_call",
                        "value": "<think>Add.</think>\n"
                        '[{"name": "a"}, {"name": "b", "arguments": "{}"}]',
                    },
                    {"from": "observation", "value": "4"},
                ]
            },
            [
                *ASKED,
                calling(
                    "<think>Add.</think>",
                    {"name": "a", "arguments": {}},
                    {"name": "b", "arguments": {}},
                ),
                RESULT,
            ],
            id="LLaMA-Factory, two calls behind a thought",
        ),
        pytest.param(
            {
                "messages": [
                    *ASKED,
                    *assistant("Wait."),
                    {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'},
                    {
                        "role": "tool_call",
                        "content": '{"name": "add", "arguments": "{\\"a\\": 2}"}',
                    },
                    {"role": "tool_response", "content": "4"},
                    {"role": "tool_response", "content": {"sum": 4}},
                    {"role": "tool_response", "content": [{"sum": 4}]},
                    {"role": "tool_response", "content": 4},
                ]
            },
            [
                *ASKED,
                calling("Wait.", CALL["function"], CALL["function"]),
                RESULT,
                {"role": "tool", "content": '{"sum": 4}'},
                {"role": "tool", "content": '[{"sum": 4}]'},
                {"role": "tool", "content": "4"},
            ],
            id="ms-swift",
        ),
        pytest.param(
            {"conversation": [{"human": "1 + 1?", "assistant": "2"}, {"tool": "4"}]},
            [*EARLIER, RESULT],
            id="ms-swift in pairs",
        ),
        pytest.param(
            {"messages": [{"from": "human", "value": "2 + 2?"}]}, ASKED, id="ShareGPT as messages"
        ),
        pytest.param(
            {
                "messages": user(
                    [{"type": "text", "text": None}, {"type": "text", "text": "2 + 2?"}]
                )
            },
            ASKED,
            id="a part without text",
        ),
        pytest.param({"messages": [json.dumps(ASKED[0])]}, ASKED, id="turns as JSON text"),
        pytest.param(
            {"messages": [{"role": "system", "content": ""}, *ASKED], "system_prompt": "Be brief."},
            [*SYSTEM, *ASKED],
            id="an empty system message is none",
        ),
        pytest.param(
            {"messages": [{"role": "developer", "content": "a"}, *ASKED], "system": "b"},
            [{"role": "developer", "content": "a"}, *ASKED],
            id="a developer message is the system message",
        ),
    ],
)
def test_agents_write_turns_in_many_ways(row, messages):
    assert parsed(row).messages == messages


def test_a_last_turn_that_calls_tools_is_the_answer():
    found = parsed({"messages": [*ASKED, CALLING]})
    assert found.messages == ASKED
    assert json.loads(found.columns["solution"]) == found.columns["tool_calls"]
    assert found.columns["tool_calls"] == [CALL["function"]]
    with_words = parsed({"messages": [*ASKED, CALLING | {"content": "a"}]})
    assert with_words.columns == {"solution": "a", "tool_calls": [CALL["function"]]}


@pytest.mark.parametrize("column", ["prompt", "query", "instruction", "messages", "conversations"])
@pytest.mark.parametrize("write", [json.dumps, repr], ids=["JSON", "Python"])
def test_turns_in_the_cell_of_a_table_are_turns(column, write):
    given = [*SYSTEM, *ASKED]
    assert parsed({column: write(given)}).messages == given


@pytest.mark.parametrize(
    "words",
    [
        "[1, 2, 3]: which is odd?",
        '[{"id": 1}, {"id": 2}]',
        '{"role": "admin"}',
        '[{"value": 3}]',
        "[{'role': who plays what?",
        "{",
        "[]",
    ],
)
def test_words_that_begin_with_a_bracket_stay_words(words):
    assert parsed({"prompt": words}).messages == user(words)


@pytest.mark.parametrize(
    "given", [[TOOL], TOOL, [SCHEMA], {"type": "function", **SCHEMA}, [json.dumps(TOOL)]]
)
def test_tools_are_schemas_in_every_spelling(given):
    for tools in (given, json.dumps(given)):
        found = parsed({"prompt": "a", "tools": tools})
        assert found.tools == [TOOL]
        assert found.columns == {"tools": tools}


@pytest.mark.parametrize("empty", [None, "", " ", [], "[]", {}])
def test_rows_without_tools_or_variables_have_none(empty):
    found = parsed({"prompt": "a", "tools": empty, "chat_template_kwargs": empty})
    assert found.tools is None
    assert found.template_kwargs == {}


@pytest.mark.parametrize("write", [dict, json.dumps])
def test_a_row_may_have_its_own_variables_of_the_template(write):
    given = write({"enable_thinking": False})
    found = parsed({"prompt": "a", "chat_template_kwargs": given})
    assert found.template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("empty", ["[]", [], [None], None, {}, ""])
def test_a_column_of_images_may_be_empty(empty):
    assert parsed({"prompt": "2 + 2?", "images": empty}).messages == ASKED


def test_the_assistant_may_have_said_nothing():
    placeholder = {"messages": [*ASKED, *assistant("")]}
    assert parsed(placeholder).columns == {}
    earlier = [*ASKED, *assistant(""), *ASKED]
    assert parsed({"messages": earlier}).messages == earlier
    with pytest.raises(BadRow, match="the assistant message has no text"):
        parsed({"messages": [*ASKED, *assistant(None), *ASKED]})
