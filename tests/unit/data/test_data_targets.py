"""What is trained on in each row: formats, flags, prompts with completions, names."""

import json

import pytest

from rlsys.data.row import Row
from rlsys.data.targets import fill_names, parse_sample, parse_text
from rlsys.json_text import BadRow


def sample(columns: dict, loss_on="all", system=None, template=None) -> Row:
    row = Row(1, "a.jsonl, line 1", columns)
    parse_sample(row, system=system, loss_on=loss_on, template=template)
    return row


def said(row: Row) -> list[str]:
    return [row.messages[i]["content"] for i in row.targets]


def asked(content: str, **keys) -> dict:
    return {"role": "user", "content": content} | keys


def answered(content: str, **keys) -> dict:
    return {"role": "assistant", "content": content} | keys


TALK = [asked("1"), answered("2"), asked("3"), answered("4")]


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        ({"messages": TALK}, ["2", "4"]),
        ({"messages": json.dumps(TALK)}, ["2", "4"]),
        (
            {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]},
            ["2"],
        ),
        ({"conversation": [{"human": "1", "assistant": "2"}]}, ["2"]),
        ({"instruction": "1", "input": "x", "output": "2", "history": [["a", "b"]]}, ["b", "2"]),
        ({"query": "1", "response": "2"}, ["2"]),
        ({"query": "1", "response": "2", "history": [["a", "b"]]}, ["b", "2"]),
        ({"prompt": "1", "completion": "2"}, ["2"]),
        ({"prompt": [asked("1")], "completion": [answered("2")]}, ["2"]),
        ({"prompt": TALK[:3], "completion": [answered("4"), asked("5"), answered("6")]}, "46"),
        ({"prompt": "1", "completion": json.dumps([answered("2")])}, ["2"]),
        ({"prompt": "1", "completion": "[2, 3]"}, ["[2, 3]"]),
    ],
)
def test_every_format_has_its_answers_as_targets(columns, texts):
    row = sample(columns)
    assert said(row) == list(texts)
    assert row.columns == {}


def test_the_last_answer_or_those_with_a_flag():
    assert said(sample({"messages": TALK}, "last")) == ["4"]
    assert said(sample({"messages": [*TALK, asked("5")]}, "last")) == ["4"]
    assert said(sample({"messages": TALK}, "flag")) == []
    flagged = [asked("1"), answered("2", loss=True), asked("3"), answered("4")]
    assert said(sample({"messages": flagged}, "flag")) == ["2"]
    # A flag comes before the config, as in ms-swift.
    assert said(sample({"messages": flagged}, "last")) == ["2", "4"]
    for no in (False, 0):
        row = sample({"messages": [asked("1", loss=no), answered("2", loss=no), *TALK]})
        assert said(row) == ["2", "4"]
        assert all("loss" not in message for message in row.messages)


def test_a_prompt_of_one_text_can_do_without_a_chat_template():
    row = sample({"prompt": "1 + 1 =", "completion": " 2"})
    assert (row.text, row.completion, row.needs_template) == ("1 + 1 =", " 2", False)
    assert sample({"query": "1", "response": "2"}).needs_template
    assert sample({"prompt": "1", "completion": "2"}, system="Be brief.").needs_template
    made = sample({"question": "1", "output": "2"}, template="Q: {question}\nA:")
    assert (made.text, made.completion, made.is_raw) == ("Q: 1\nA:", "2", True)


def test_system_tools_and_variables_are_read_as_for_prompts():
    row = sample({"query": "1", "response": "2", "system": "S", "tools": [{"name": "f"}]})
    assert row.messages[0] == {"role": "system", "content": "S"}
    assert row.targets == [2]
    assert row.tools is not None
    assert sample({"messages": TALK}, system="S").targets == [2, 4]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"messages": [asked("1")]}, "has no turn of the assistant to train on, only of user"),
        ({"query": "1"}, "has no turn of the assistant"),
        ({"prompt": "1", "solution": "2"}, "no column 'completion'.*data.columns"),
        ({"prompt": "1", "completion": ""}, "the column 'completion' is empty"),
        ({"prompt": "1", "completion": 2}, "expected a list of messages or a prompt, found 2"),
        ({"prompt": TALK, "completion": [asked("5")]}, "has no turn of the assistant"),
        ({"query": "1", "response": "  "}, "the column 'response' is empty"),
        ({"query": "1", "response": 7}, "the column 'response' is not a text: 7"),
        ({"messages": [asked("1"), answered("")]}, "message 2, of the assistant, is empty"),
        ({"messages": [asked("1"), answered(None)]}, "the assistant message has no text"),
        ({"messages": [asked("1"), answered(3)]}, "no text but a value"),
        ({"messages": [asked("1"), {"role": "ai", "content": "2"}]}, "'role': one of system"),
        ({"messages": [asked("1", loss=1), answered("2")]}, "'user' has loss true"),
        ({"messages": [asked("1"), answered("2", loss="yes")]}, "'loss' of a message is 'yes'"),
        ({"messages": [asked("1"), answered("2", loss=0.5)]}, "'loss' of a message is 0.5"),
        ({"prompt": [answered("1", loss=1)], "completion": "2"}, "'assistant' has loss true"),
        ({"other": "1"}, "has no prompt"),
        ({"query": "1", "response": "2", "images": ["a.png"]}, "has images"),
    ],
)
def test_what_cannot_be_trained_on_is_an_error_that_says_why(columns, says):
    with pytest.raises(BadRow, match=says):
        sample(columns)


def test_a_template_needs_a_completion():
    with pytest.raises(BadRow, match="none of completion, response, output is there"):
        sample({"question": "1", "answer": "2"}, template="Q: {question}")


def test_an_empty_answer_is_fine_where_it_is_not_trained_on():
    row = sample({"messages": [asked("1"), answered("", loss=False), asked("2"), answered("3")]})
    assert said(row) == ["3"]
    thought = [asked("1"), answered("", reasoning_content="hm")]
    assert len(sample({"messages": thought}).targets) == 1


def test_calls_are_targets_and_parts_of_a_turn_agree_on_the_flag():
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    result = {"role": "tool_response", "content": "1"}
    row = sample({"messages": [asked("1"), call, result, answered("2")]})
    assert row.targets == [1, 3]
    parts = [asked("1"), answered("so", loss=False), call | {"loss": True}, result, answered("2")]
    with pytest.raises(BadRow, match="differ in 'loss'"):
        sample({"messages": parts})


# --- texts ---------------------------------------------------------------------------------------


def text_row(columns):
    row = Row(1, "a.jsonl, line 1", columns)
    parse_text(row)
    return row


def test_texts_are_read_as_they_are():
    row = text_row({"text": " a\n", "url": "x"})
    assert (row.text, row.is_raw, row.columns) == (" a\n", True, {"url": "x"})
    assert text_row({"messages": [answered("a")]}).text == "a"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"content": "a"}, r"no column 'text'.*it has content.*data.columns"),
        ({"text": ""}, "the column 'text' is empty"),
        ({"text": ["a"]}, "the column 'text' is not a text"),
        ({"messages": TALK}, "no column 'text'"),
    ],
)
def test_rows_without_a_text(columns, says):
    with pytest.raises(BadRow, match=says):
        text_row(columns)


# --- self-cognition ------------------------------------------------------------------------------


def named(response, names, **columns):
    row = sample({"query": "Who are you, {{NAME}}?", "response": response, **columns})
    fill_names(row, names)
    return [message["content"] for message in row.messages]


BOTH = {"model_name": ["小黄", "Xiao Huang"], "model_author": ["魔搭", "ModelScope"]}


def test_names_are_chosen_by_the_language_of_the_row():
    answer = "{{NAME}}, by {{AUTHOR}}."
    assert named(answer, BOTH, tag="zh") == ["Who are you, 小黄?", "小黄, by 魔搭."]
    assert named(answer, BOTH, tag="en")[1] == "Xiao Huang, by ModelScope."
    one = {"model_name": ["Bo"], "model_author": ["Us"]}
    assert named(answer, one) == ["Who are you, Bo?", "Bo, by Us."]
    assert named(answer, one, tag="zh")[1] == "Bo, by Us."


@pytest.mark.parametrize(
    ("names", "columns", "says"),
    [
        ({"model_name": ["Bo"]}, {}, r"placeholder \{\{AUTHOR\}\}, and data.model_author is not"),
        ({"model_author": ["Us"]}, {"tag": "en"}, r"\{\{NAME\}\}, and data.model_name"),
        (BOTH, {}, "the column 'tag' is None: .*zh or en"),
        (BOTH, {"tag": "fr"}, "the column 'tag' is 'fr'"),
    ],
)
def test_a_placeholder_without_a_value(names, columns, says):
    with pytest.raises(BadRow, match=says):
        named("{{NAME}} of {{AUTHOR}}", names, **columns)


def test_rows_without_placeholders_need_no_names():
    row = sample({"query": "{{ NAME }}", "response": "{NAME}"})
    fill_names(row, {})
    assert said(row) == ["{NAME}"]
