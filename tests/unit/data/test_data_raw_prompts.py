"""Prompts as plain text: models without a chat template, and data.prompt_template."""

from copy import copy

import pytest
from config_cases import values
from data_cases import chat_tokenizer, load, user, word_tokenizer, write_jsonl

from rlsys.config import Config
from rlsys.model.raw_text import RawText


@pytest.fixture
def base():
    """A tokenizer without chat template that puts BOS in front, as Llama's does."""
    tokenizer = copy(word_tokenizer())
    tokenizer.chat_template = None
    return tokenizer


def prompts(tokenizer, tmp_path, *rows, **options):
    return load(tokenizer, write_jsonl(tmp_path / "train.jsonl", [*rows]), **options).train


def test_a_text_is_the_prompt_of_a_model_without_a_template(base, tmp_path):
    [prompt] = prompts(base, tmp_path, {"prompt": "a b", "target": 3})
    assert base.decode(prompt.token_ids) == "<s> a b"
    assert prompt.token_ids == base("a b")["input_ids"]
    assert prompt.messages == user("a b")
    assert prompt.columns == {"target": 3}


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"messages": user("a")}, {}),
        ({"query": "a"}, {}),
        ({"prompt": user("a")}, {}),
        ({"prompt": "a", "system": "b"}, {}),
        ({"prompt": "a"}, {"system": "b"}),
    ],
)
def test_a_conversation_takes_a_template(base, tmp_path, row, options):
    with pytest.raises(ValueError, match=r"line 1: .* has no chat template") as caught:
        prompts(base, tmp_path, row, **options)
    assert "data.prompt_template" in str(caught.value)


@pytest.mark.parametrize("has_template", [True, False])
def test_a_template_of_columns_is_the_prompt_of_any_model(tmp_path, has_template):
    tokenizer = copy(chat_tokenizer("<s>{{ messages[0].content }}!"))
    if not has_template:
        tokenizer.chat_template = None
    row = {"question": "1 + 1?", "n": [1, None], "prompt": "p", "solution": "2"}
    template = "{{Q}}: {question} {n} {prompt}\nA:"
    [prompt] = prompts(tokenizer, tmp_path, row, prompt_template=template)
    assert tokenizer.decode(prompt.token_ids) == "{Q}: 1 + 1? [1, null] p\nA:"
    assert prompt.columns == {"question": "1 + 1?", "n": [1, None], "solution": "2"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"Question": "a", "b": 1}, "names 'question', and dataset .* has the columns Question, b"),
        (
            {"question": None, "b": 1},
            "line 1: has no column 'question', which data.prompt",
        ),
    ],
)
def test_a_column_that_a_row_lacks_is_named(base, tmp_path, row, words):
    with pytest.raises(ValueError, match=words):
        prompts(base, tmp_path, row, prompt_template="{question}")


def test_what_a_prompt_without_a_template_leaves_out_is_named(base, tmp_path):
    tool = {"type": "function", "function": {"name": "get", "parameters": {}}}
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "tools": [tool], "system": "b"}])
    notices = load(base, file, prompt_template="{prompt}").notices
    for column in ("tools", "system"):
        assert any(f"leaves out the column '{column}'" in notice for notice in notices)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"prompt_template": "no column"}, "names no column"),
        ({"prompt_template": "{a.b}"}, "is not the name of a column"),
        ({"prompt_template": "{a[0]}"}, "is not the name of a column"),
        ({"prompt_template": "{a!r}"}, "is not the name of a column"),
        ({"prompt_template": "{a:>9}"}, "is not the name of a column"),
        ({"prompt_template": "{}"}, "is not the name of a column"),
        ({"prompt_template": "{a"}, "write {{ and }}"),
        ({"prompt_template": "{a}", "system": "b"}, "data.system would not be read"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_with_the_config(data, words):
    with pytest.raises(ValueError, match=words.replace("{", r"\{")):
        Config.model_validate(values(data=data))


def test_bos_is_written_once_and_eos_never():
    """A prompt that ends with EOS asks the model to continue a text that is over."""
    from tokenizers import processors

    tokenizer = chat_tokenizer("{{ messages }}")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    raw = RawText.of(tokenizer)
    assert (raw.before, raw.after) == ([0], [1])
    plain, with_bos = raw.tokens(["ab", "<s>ab"])
    assert plain == with_bos == tokenizer("ab")["input_ids"][:-1]
