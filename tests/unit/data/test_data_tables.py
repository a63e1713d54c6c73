"""What was not in a row before it became part of a table is not in its prompt, at any depth."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from data_cases import chat_tokenizer, load, user, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.data import RowPreprocessor, preprocessors
from rlsys.data.tables import without_fill

NAMES = st.sampled_from(["city", "unit", "day", "deep"])
TEXTS = st.sampled_from(["Rome", "", "C"])
OBJECTS = st.dictionaries(NAMES.filter(lambda name: name != "deep"), TEXTS, max_size=3)
ARGUMENTS = st.tuples(OBJECTS, OBJECTS | st.none(), st.lists(OBJECTS, max_size=2)).map(
    lambda parts: (
        parts[0]
        | ({"deep": parts[1]} if parts[1] else {})
        | ({"list": parts[2]} if parts[2] else {})
    )
)
TEXT = [{"type": "text", "text": "Rome?"}]
PARTS = st.lists(TEXTS, min_size=1, max_size=2).map(
    lambda texts: [{"type": "text", "text": text} for text in ["Rome?", *texts]]
)


def row_of(arguments, parts, properties, variables):
    call = {"id": "c1", "type": "function"}
    call |= {"function": {"name": "weather", "arguments": arguments}}
    described = {name: {"type": "string"} | more for name, more in properties.items()}
    parameters = {"type": "object", "properties": described}
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [], "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "21"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        "chat_template_kwargs": variables,
        "expected": {"facts": [arguments]},
    }


ROWS = st.builds(
    row_of,
    ARGUMENTS,
    PARTS,
    st.dictionaries(NAMES, st.dictionaries(st.just("description"), TEXTS), max_size=3),
    st.dictionaries(st.sampled_from(["x", "y"]), TEXTS),
)


@given(st.lists(ROWS, min_size=2, max_size=4))
@settings(max_examples=25, deadline=None)
def test_a_row_of_a_table_is_the_row_it_was_made_of(rows):
    import datasets

    table = datasets.Dataset(pyarrow.Table.from_pylist(rows))
    assert [without_fill(row, table.features) for row in table] == rows
    assert [without_fill(row, None) for row in table] == rows


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_every_kind_of_table_gives_the_prompts_of_its_rows(tmp_path, kind):
    import datasets

    rows = [
        row_of({"city": "Rome"}, TEXT, {"city": {}}, {"enable_thinking": "no"}),
        row_of({"deep": {"day": "C"}, "list": [{"unit": "C"}, {}]}, TEXT, {"day": {}}, {"x": "y"}),
    ]
    tokenizer, options = chat_tokenizer("qwen3"), {"max_prompt_length": 10_000}
    expected = load(tokenizer, write_jsonl(tmp_path / "a.jsonl", rows), **options).train
    table, file = pyarrow.Table.from_pylist(rows), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    elif kind == "saved":
        datasets.Dataset(table).save_to_disk(str(file))
    else:
        with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
            stream.write_table(table)
    found = load(tokenizer, str(file), **options).train
    for one, other in zip(found, expected, strict=True):
        text = tokenizer.decode(one.token_ids)
        assert "null" not in text
        assert "None" not in text
        # Arrow has keys in an order of its own.
        assert sorted(text) == sorted(tokenizer.decode(other.token_ids))
        assert (one.messages, one.columns) == (other.messages, other.columns)


def asked(**arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [*user("Rome?"), {"role": "assistant", "tool_calls": [call]}, *user("Well?")]


def arguments_of(prompt):
    return prompt.messages[1]["tool_calls"][0]["function"]["arguments"]


def test_a_null_that_a_row_has_stays_where_a_table_holds_json(tmp_path):
    import datasets

    given = [{"city": None, "n": 1}, {"day": "today"}]
    rows = [{"messages": asked(**arguments)} for arguments in given]
    as_text = [{"messages": json.dumps(row["messages"])} for row in rows]
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_text), tmp_path / "text.parquet")
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    table.to_parquet(tmp_path / "json.parquet")
    for source in (lines, tmp_path / "text.parquet", tmp_path / "json.parquet"):
        prompts = load(chat_tokenizer("qwen3"), str(source)).train
        assert [arguments_of(prompt) for prompt in prompts] == given


def test_prepare_dataset_adds_nothing_to_a_row(tmp_path):
    class Whole(RowPreprocessor):
        def prepare_dataset(self, dataset):
            return dataset.map(lambda row: {"n": len(row["messages"])})

    given = [{"city": "Rome"}, {"day": "today"}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": asked(**some)} for some in given])
    preprocessors["whole"] = Whole
    try:
        data = load(chat_tokenizer("qwen3"), source, preprocessor=["whole"])
    finally:
        del preprocessors["whole"]
    assert [arguments_of(prompt) for prompt in data.train] == given
    assert [prompt.columns for prompt in data.train] == [{"n": 3}] * 2


def test_nan_is_a_missing_value(tmp_path):
    columns = {"prompt": ["a", "b"], "answer": [float("nan"), 2.0], "system": [None, "c"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    prompts = load(chat_tokenizer("qwen3"), str(tmp_path / "a.parquet")).train
    assert [prompt.columns for prompt in prompts] == [{"answer": None}, {"answer": 2.0}]
