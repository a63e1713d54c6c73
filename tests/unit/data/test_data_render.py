"""The chat template shows what a row has, or the run names what it leaves out."""

import json

import pytest
from data_cases import chat_tokenizer, load, parsed, user, write_jsonl

from rlsys.data.render import Renderer, render_prompt

SCHEMA = {
    "name": "get_weather",
    "description": "How the weather is in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": SCHEMA}]


def asked_and_called(arguments) -> list[dict]:
    call = {"id": "call00001", "type": "function"}
    call |= {"function": {"name": "get_weather", "arguments": arguments}}
    return [
        *user("Rome?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": "21 degrees"},
    ]


def rendered(template: str, row: dict, **variables) -> tuple[str, list[str]]:
    """The prompt as text, and what the template left out."""
    tokenizer = chat_tokenizer(template)
    chat = Renderer(tokenizer, variables)
    found = parsed(row)
    chat.render([found])
    assert not found.problem
    return tokenizer.decode(found.token_ids), chat.notices


@pytest.mark.parametrize(
    "template",
    ["qwen2_5", "qwen3", "qwen3_6", "qwen3_instruct_2507", "llama3_1", "glm4moe", "lfm2_2_5"],
)
@pytest.mark.parametrize("write", [list, json.dumps], ids=["list", "JSON text"])
def test_tools_and_calls_of_a_row_are_in_its_prompt(template, write):
    row = {"messages": asked_and_called('{"city": "Rome"}'), "tools": write(TOOLS)}
    text, notices = rendered(template, row)
    for words in (SCHEMA["description"], "get_weather", "Rome?", "21 degrees"):
        assert words in text
    assert [one for one in notices if "ends the prompt with <think>" not in one] == []
    # OpenAI's JSON text of arguments is not quoted a second time.
    assert text == rendered(template, row | {"messages": asked_and_called({"city": "Rome"})})[0]
    assert SCHEMA["description"] not in rendered(template, {"messages": row["messages"]})[0]


@pytest.mark.parametrize("template", ["deepseekv3", "deepseek_r1_distill"])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_a_template_that_wants_arguments_as_text_gets_them(template, arguments):
    text, _ = rendered(template, {"messages": asked_and_called(arguments)})
    assert '```json\n{"city": "Rome"}\n```' in text


def test_a_template_that_prints_arguments_gets_them_as_text():
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    text, _ = rendered(template, {"messages": asked_and_called({"city": "Rome", "n": None})})
    assert text == 'Rome?{"city": "Rome", "n": null}21 degrees'


def test_a_tokenizer_may_have_another_template_for_tools():
    tokenizer = chat_tokenizer("{}")
    tokenizer.chat_template = {
        "default": "{{ messages[-1].content }}",
        "tool_use": "{{ messages[-1].content }}{{ tools | tojson }}",
    }
    chat = Renderer(tokenizer)
    rows = [parsed({"prompt": "a"}), parsed({"prompt": "a", "tools": TOOLS})]
    chat.render(rows)
    plain, with_tools = (tokenizer.decode(row.token_ids) for row in rows)
    assert (plain, with_tools) == ("a", "a" + json.dumps(TOOLS))
    assert chat.notices == []


def test_a_template_that_knows_no_tools_is_named_once(tmp_path):
    rows = [{"messages": asked_and_called({"city": "Rome"}), "tools": TOOLS}] * 3
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    data = load(chat_tokenizer("llama3"), source)
    about = f"({source}, line 1 and 2 more)"
    assert data.summary()[1:] == [
        f"data: the chat template leaves out the calls of tools {about}",
        "data: the chat template leaves out the tools: the prompt is the same without them "
        + about,
    ]


def test_rows_with_other_tools_or_variables_are_other_prompts(tmp_path):
    variables = {"enable_thinking": False}
    rows = [
        {"prompt": "a"},
        {"prompt": "a", "tools": TOOLS},
        {"prompt": "a", "chat_template_kwargs": variables},
        {"prompt": "a", "tools": json.dumps(TOOLS)},
        {"prompt": "a", "chat_template_kwargs": {}},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    tokenizer, options = chat_tokenizer("qwen3"), {"max_prompt_length": 2000, "shuffle": False}
    for streaming in (False, True):
        data = load(tokenizer, source, streaming=streaming, **options)
        prompts = data.streams[0].take(5) if streaming else data.train
        ids = [tuple(prompt.token_ids) for prompt in prompts]
        assert ids[0] == ids[4]
        assert ids[1] == ids[3]
        assert len(set(ids)) == 3
        assert data.notices == []
    unique = load(tokenizer, source, deduplicate=True, **options).train
    assert [prompt.prompt_id for prompt in unique] == ["a:1", "a:2", "a:3"]


def test_a_row_goes_before_the_config_in_variables():
    template = "{{ enable_thinking }}{{ messages[0].content }}"
    row = {"prompt": "a", "chat_template_kwargs": {"enable_thinking": 1}}
    assert rendered(template, row, enable_thinking=0)[0] == "1a"
    assert rendered(template, {"prompt": "a"}, enable_thinking=0)[0] == "0a"


def test_developer_is_system_where_the_template_does_not_know_it():
    messages = [{"role": "developer", "content": "Be brief."}, *user("a")]
    text, notices = rendered("qwen2_5", {"messages": messages})
    system = [{"role": "system", "content": "Be brief."}, *user("a")]
    assert text == rendered("qwen2_5", {"messages": system})[0]
    assert notices == []
    both = [{"role": "system", "content": "Be kind."}, *messages]
    assert "Be kind.\n\nBe brief." in rendered("qwen3_6", {"messages": both})[0]
    knows = "{% for m in messages %}{{ 'D' if m.role == 'developer' }}{{ m.content }}{% endfor %}"
    assert rendered(knows, {"messages": messages})[0] == "DBe brief.a"


MESSAGES = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        (
            "{{ messages[-1].content }}",
            {"prompt": "a", "system": "Be brief."},
            "leaves out or changes the text of a system turn",
        ),
        (MESSAGES, {"messages": [{**user("a")[0], "name": "Ann"}]}, "does not read 'name' of a"),
        (
            MESSAGES,
            {"prompt": "a", "chat_template_kwargs": {"enable_thinking": False}},
            "does not read the variable 'enable_thinking'",
        ),
        (MESSAGES, {"prompt": "Make 7 equal None."}, "Make 7 equal None.'"),
        (MESSAGES + " {{ none }}", {"prompt": "a"}, "has the word None"),
        (MESSAGES, {"prompt": "It was nan degrees."}, "has the word nan"),
    ],
)
def test_what_a_prompt_lacks_is_named(template, row, words):
    _, [notice] = rendered(template, row)
    assert words in notice
    assert "(a.jsonl, line 1" in notice


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (MESSAGES, {"prompt": " a\n"}),
        ("{{ messages[-1].content | trim }}", {"prompt": " a\n"}),
        (MESSAGES, {"prompt": "(D) None of the above, Nonetheless, Nan, NaN"}),
        ("{{ messages | tojson }}", {"prompt": 'a "quoted"\nword'}),
    ],
)
def test_a_prompt_that_lacks_nothing_is_not_named(template, row):
    assert rendered(template, row)[1] == []


def test_a_variable_of_the_config_that_no_template_reads_is_named():
    _, [notice] = rendered("qwen2_5", {"prompt": "a"}, enable_thinking=False)
    assert "does not read the variable 'enable_thinking' (data.chat_template_kwargs)" in notice


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Only questions,\n please') }}", "refuses it: Only questions, please"),
        ("{{ messages[0].content + 1 }}", "refuses it: TypeError: can only concatenate str"),
        (
            "{{ messages[0].content | items | list }}",
            "refuses it: TypeError: Can only get item pairs",
        ),
        ("{{ messages[0].nothing.more }}", "refuses it: UndefinedError: 'dict object' has no"),
        ("{{ 1 / 0 }}", "refuses it: ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_a_template_raises_names_file_and_line(tmp_path, template, words):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="the data has 1 problem:") as caught:
            load(chat_tokenizer(template), source, streaming=streaming)
        _, line = str(caught.value).splitlines()
        assert f"{source}, line 1: the chat template {words}" in line
        assert line.endswith(" (also line 2)")


def test_arguments_that_no_template_could_read_name_the_row(tmp_path):
    rows = [{"messages": asked_and_called(a)} for a in ('{"city": "Rome"}', "city=Rome")]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"line 2: the chat template refuses it: TypeError: Can o"):
        load(chat_tokenizer("qwen3_6"), source)


def test_a_template_that_is_not_jinja_is_one_error(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}] * 3)
    with pytest.raises(ValueError, match=r"is not valid Jinja: Unexpected end.* in its line 1"):
        load(chat_tokenizer("{% if a %}"), source)


def test_one_prompt_alone():
    tokenizer = chat_tokenizer("{{ bos_token }}" + MESSAGES)
    assert tokenizer.decode(render_prompt(user("a"), tokenizer)) == "<s>a"
    with pytest.raises(ValueError, match="the assistant message has no text but a value"):
        render_prompt([*user("a"), {"role": "assistant", "content": 3}], tokenizer)
    with pytest.raises(ValueError, match="the chat template refuses it: no"):
        render_prompt(user("a"), chat_tokenizer("{{ raise_exception('no') }}"))


OPENING = MESSAGES + "{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prompt_that_opens_think_says_so(tmp_path, streaming):
    rows = [{"prompt": "Write <think>"}, {"prompt": "b"}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    for template, opens in ((OPENING, True), (MESSAGES + "|", False)):
        data = load(chat_tokenizer(template), source, streaming=streaming)
        prompts = data.streams[0].take(2) if streaming else data.train
        assert [prompt.opens_think for prompt in prompts] == [opens] * 2
        assert any("ends the prompt with <think>" in line for line in data.summary()) is opens
