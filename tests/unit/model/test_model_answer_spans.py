"""The targets of a conversation are what transformers' marks say, to the character."""

import pytest
from answer_templates import SPECIAL, TEMPLATES, WITH_SYSTEM, WITH_TOOLS, tokenizer_of, unmarked
from data_cases import chat_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlsys.json_text import BadRow
from rlsys.model.answer_spans import AnswerSpans
from rlsys.model.chat_template import ChatTemplate

TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
WORDS = st.sampled_from(
    [
        *("a", "b ", " c", "é", "日本", "🙂", "\n", "{{ x }}", "{% if %}", "[/INST]", "[INST] a"),
        *("<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "</s>", "<end_of_turn>\n"),
        *("<|end|>", "<|Assistant|>", "### Response:\n", "qzAnswer", "<start_of_turn>model\n"),
    ]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=5).map("".join).filter(str.strip)
PLAIN_TEXTS = st.text("abc é日🙂", min_size=1, max_size=8).filter(str.strip)


@st.composite
def conversations(draw, name):
    """Turns for a template, and tools if some are called."""
    messages = []
    if name in WITH_SYSTEM and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    tools = None
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        if name in WITH_TOOLS and draw(st.integers(0, 3)) == 0:
            tools = TOOLS
            call = {"name": "get", "arguments": {"key": draw(PLAIN_TEXTS)}}
            said = draw(st.sampled_from(["", "I ask."])) if name in ("qwen2", "qwen3") else ""
            calls = [{"type": "function", "id": "call00001", "function": call}]
            messages.append({"role": "assistant", "content": said, "tool_calls": calls})
            messages.append({"role": "tool", "name": "get", "content": draw(TEXTS)})
        answer = draw(TEXTS)
        if name == "qwen3" and draw(st.booleans()):
            answer = f"<think>\n{draw(PLAIN_TEXTS)}\n</think>\n\n{answer}"
        messages.append({"role": "assistant", "content": answer})
    return messages, tools


def answers(messages):
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def both(name, messages, tools, special=SPECIAL, **variables):
    """Text and spans: of the template without marks, and of the one with marks."""
    found = []
    for template in (unmarked(TEMPLATES[name]), TEMPLATES[name]):
        chat = ChatTemplate(tokenizer_of(template, special), variables)
        found.append(AnswerSpans(chat, special).find(messages, answers(messages), tools))
    return found


@pytest.mark.parametrize("name", TEMPLATES)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_spans_without_marks_are_those_of_the_marks(name, data):
    messages, tools = data.draw(conversations(name))
    found, expected = both(name, messages, tools)
    assert found == expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "phi"])
def test_tokenizers_whose_turns_end_without_a_special_token(name):
    messages = [*turns("Hi", "Hello"), *turns("More", "Bye")]
    found, expected = both(name, messages, None, special=())
    assert found == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_answer_several_times_is_found_at_its_places(name):
    text, spans = both(name, [*turns("x", "x"), *turns("x", "x"), *turns("x", "x")], None)[0]
    assert len(spans) == 3
    assert all(
        text[a:b].removeprefix("<think>\n\n</think>\n\n").strip()[0] == "x" for a, b in spans
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_is_another_conversation(name):
    """The text of a whole turn in an answer, where one rendering leaves two ways to read it."""
    tokenizer = tokenizer_of(unmarked(TEMPLATES[name]))
    inner = ChatTemplate(tokenizer).text([*turns("u", "v"), *turns("u", "w")], is_answered=True)
    inner = inner.replace("<think>\n\n</think>\n\n", "").strip()
    messages = [*turns("u", inner), *turns("u", "v"), *turns("u", "w")]
    found, expected = both(name, messages, None)
    assert found == expected


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content.split('#')[0] }}</s>{% endfor %}"


def turns(asked, answered, **more):
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answered} | more,
    ]


def spans_of(template, messages, tools=None, special=SPECIAL, **variables):
    tokenizer = tokenizer_of(template)
    finder = AnswerSpans(ChatTemplate(tokenizer, variables), special)
    text, spans = finder.find(messages, answers(messages), tools)
    return [text[start:end] for start, end in spans]


def test_thinking_of_earlier_turns_is_what_the_template_makes_of_it():
    thought = "<think>\nr\n</think>\n\n"
    messages = [*turns("a", f"{thought}b"), *turns("c", f"{thought}d")]
    template = unmarked(TEMPLATES["qwen3"])
    assert spans_of(template, messages) == ["b<|im_end|>", f"{thought}d<|im_end|>"]
    apart = [*turns("a", "b", reasoning_content="r"), *turns("c", "d", reasoning_content="r")]
    assert spans_of(template, apart) == ["b<|im_end|>", f"{thought}d<|im_end|>"]


def test_what_the_generation_prompt_writes_is_not_trained_on():
    template = unmarked(TEMPLATES["qwen3"])
    assert spans_of(template, turns("a", "b")) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    assert spans_of(template, turns("a", "b"), enable_thinking=False) == ["b<|im_end|>"]
    always = template.replace(
        "{{ '<|im_start|>assistant\n' }}\n{%- if enable",
        "{{ '<|im_start|>assistant\n<think>\n' }}\n{%- if enable",
    )
    assert always != template
    said = turns("a", "<think>\nr\n</think>\n\nb")
    assert spans_of(always, said) == ["r\n</think>\n\nb<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}", turns("a", "b"),
         "writes nothing that ends a turn"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}</s>{% endfor %}",
         turns("a", "b"), "an answer changes the text before it"),
        (CHAT,
         turns("a", "b # c"), r"leaves out or changes the text of an assistant turn, 'b # c'"),
        (CHAT, turns("a", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
         "leaves out the calls of tools of an assistant turn, 'f'"),
        (CHAT + "{{ 'short' if messages[-1].content == 'bcd' }}",
         turns("a", "bcd"), "what is around an answer depends on the answer"),
        (unmarked(TEMPLATES["qwen2"]),
         turns("a", "", tool_calls=[{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]),
         r"a call of a tool has the text '<\|im_end\|>', which ends a turn"),
        (TEMPLATES["chatml"].replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}",
                                     "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"),
         turns("a", "b"), r"leaves '<\|im_end\|>' behind the \{% generation %\} block"),
        (TEMPLATES["gemma"], [{"role": "system", "content": "s"}, *turns("a", "b")],
         "the chat template refuses it: system is not supported"),
        (TEMPLATES["chatml"].replace("m.role == 'assistant'", "loop.last"),
         [*turns("a", "b"), *turns("c", "d")], "marks 1 parts .* 2 turns of the assistant"),
    ],
)  # fmt: skip
def test_a_template_that_is_not_exact_is_refused_with_the_reason(template, messages, says):
    with pytest.raises(BadRow, match=says):
        spans_of(template, messages)


@pytest.mark.parametrize(
    "name",
    ["gemma", "llama3", "phi3", "qwen2_5", "qwen3_instruct_2507", "deepseekv3", "cohere2"],
)
@given(st.data())
@settings(max_examples=15, deadline=None)
def test_published_templates_agree_with_the_marked_ones_of_trl(name, data):
    """TRL marks the line break behind a turn too, and in some templates the header."""
    messages, _ = data.draw(conversations("gemma"))
    assume("</think>" not in str(messages))
    ours, marked = [], []
    for found, template in ((ours, name), (marked, f"{name}_training")):
        tokenizer = chat_tokenizer(template)
        text, spans = AnswerSpans(ChatTemplate(tokenizer), SPECIAL).find(
            messages, answers(messages)
        )
        found += [text, *(text[start:end] for start, end in spans)]
    assert ours[0] == marked[0]
    for own, theirs in zip(ours[1:], marked[1:], strict=True):
        outside = theirs.replace(own, "", 1)
        assert own in theirs
        assert outside in ("", "\n", "\n\n", "\n</s>") or "Assistant" in outside
