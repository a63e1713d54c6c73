"""Rows to prompts: nothing lost, nothing doubled, and errors that name the file and the row."""

import json
from collections import Counter
from pathlib import Path

import pytest
from data_cases import assistant, load, user, word_tokenizer, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.data import split_prompts
from rlsys.data.row import TOO_LONG
from rlsys.types import Prompt


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def test_the_template_is_applied_once_and_bos_is_not_doubled(tokenizer, tmp_path):
    assert tokenizer("<s> a").input_ids.count(tokenizer.bos_token_id) == 2  # the trap is armed
    data = load(tokenizer, write_jsonl(tmp_path / "train.jsonl", [{"messages": user("a b")}]))
    [prompt] = data.train
    assert tokenizer.decode(prompt.token_ids) == "<s> [ user ] a b [ assistant ]"
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    assert all(type(token) is int for token in prompt.token_ids)


def test_the_template_gets_its_variables(tokenizer, tmp_path):
    from copy import copy

    thinking = copy(tokenizer)
    thinking.chat_template = "{{ bos_token }}" + "{% if deep %}a{% else %}b{% endif %}"
    source = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "c"}])
    [plain] = load(thinking, source).train
    [deep] = load(thinking, source, chat_template_kwargs={"deep": True}).train
    assert thinking.decode(plain.token_ids) == "<s> b"
    assert thinking.decode(deep.token_ids) == "<s> a"


def test_messages_and_both_kinds_of_prompt_give_the_same(tokenizer, tmp_path):
    rows = [
        {"messages": user("a")},
        {"prompt": "a"},
        {"prompt": user("a")},
        {"messages": None, "prompt": "a"},
    ]
    data = load(tokenizer, write_jsonl(tmp_path / "train.jsonl", rows))
    assert [prompt.messages for prompt in data.train] == [user("a")] * 4
    assert len({tuple(prompt.token_ids) for prompt in data.train}) == 1
    assert [prompt.prompt_id for prompt in data.train] == [f"train:{i}" for i in (1, 2, 3, 4)]


def test_the_system_message_is_put_before_rows_that_have_none(tokenizer, tmp_path):
    own = [{"role": "system", "content": "b"}, *user("a")]
    source = write_jsonl(tmp_path / "train.jsonl", [{"messages": user("a")}, {"messages": own}])
    first, second = load(tokenizer, source, system="c").train
    assert first.messages == [{"role": "system", "content": "c"}, *user("a")]
    assert tokenizer.decode(first.token_ids) == "<s> [ system ] c [ user ] a [ assistant ]"
    assert second.messages == own


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(JSON, min_size=1, max_size=4))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_columns_pass_unchanged(tokenizer, tmp_path, values):
    rows = [{"messages": user("a"), "column": value} for value in values]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    columns = [prompt.columns for prompt in load(tokenizer, str(path)).train]
    assert columns == [{"column": value} for value in values]
    assert [repr(c["column"]) for c in columns] == [repr(value) for value in values]


def test_texts_that_look_like_dates_stay_texts_and_integers_integers(tokenizer, tmp_path):
    rows = [
        {"messages": user("a"), "answer": "2024-01-31", "x": 1},
        {"messages": user("a"), "answer": "2024-02-01", "x": 0.5},
        {"prompt": "a"},
    ]
    first, _, third = load(tokenizer, write_jsonl(tmp_path / "train.jsonl", rows)).train
    assert first.columns == {"answer": "2024-01-31", "x": 1}
    assert type(first.columns["x"]) is int
    assert third.columns == {"answer": None, "x": None}


def test_json_lists_and_parquet_hold_the_same_rows_as_jsonl(tokenizer, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "system", "content": "b", "name": "x"}, *user("a")], "nums": [1, 2]},
        {"messages": user("c"), "nums": [3]},
    ]
    write_jsonl(tmp_path / "lines.jsonl", rows)
    Path("list.json").write_text(json.dumps(rows, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "table.parquet")
    lines, listed, table = (
        load(tokenizer, name).train for name in ("lines.jsonl", "list.json", "table.parquet")
    )
    assert [p.columns for p in lines] == [{"nums": [1, 2]}, {"nums": [3]}]
    assert [p.messages for p in lines] == [row["messages"] for row in rows]
    for other in (listed, table):
        assert [p.columns for p in other] == [p.columns for p in lines]
        assert [p.messages for p in other] == [p.messages for p in lines]
        assert [p.token_ids for p in other] == [p.token_ids for p in lines]


def test_a_folder_loads_as_a_hub_dataset_does(tokenizer, tmp_path):
    write_jsonl(tmp_path / "folder" / "train.jsonl", [{"prompt": "a", "nums": [1]}])
    write_jsonl(tmp_path / "folder" / "test.jsonl", [{"prompt": "b", "nums": [2]}])
    folder = str(tmp_path / "folder")
    data = load(tokenizer, folder, val_dataset=[folder])
    assert [prompt.columns for prompt in data.train] == [{"nums": [1]}]
    assert [prompt.columns for prompt in data.validation] == [{"nums": [2]}]


def test_several_files_add_up_and_ids_stay_unique(tokenizer, tmp_path):
    one = write_jsonl(tmp_path / "x" / "train.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    two = write_jsonl(tmp_path / "y" / "train.jsonl", [{"prompt": "c"}])
    three = write_jsonl(tmp_path / "more.jsonl", [{"prompt": "d"}])
    ids = [prompt.prompt_id for prompt in load(tokenizer, one, two, three).train]
    assert ids == [f"{one}:1", f"{one}:2", f"{two}:1", "more:1"]
    with pytest.raises(ValueError, match="listed twice"):
        load(tokenizer, one, one)


def test_long_prompts_are_dropped_and_counted(tokenizer, tmp_path):
    rows = [{"prompt": "a " * n} for n in (1, 2, 5, 3, 50)]
    source = write_jsonl(tmp_path / "train.jsonl", rows)
    data = load(tokenizer, source, max_prompt_length=10)
    assert [len(prompt.token_ids) for prompt in data.train] == [8, 9, 10]
    assert [prompt.prompt_id for prompt in data.train] == ["train:1", "train:2", "train:4"]
    assert data.counts[0].dropped == {TOO_LONG: 2}
    with pytest.raises(ValueError, match=r"every prompt of .*train\.jsonl.* 7 tokens.* 8 to 57"):
        load(tokenizer, source, max_prompt_length=7)


def test_a_validation_set_of_its_own(tokenizer, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": "a " * 50}])
    held_out = write_jsonl(tmp_path / "val.jsonl", [{"prompt": c} for c in ("b " * 50, *"bcd")])
    data = load(tokenizer, train, val_dataset=[held_out], max_prompt_length=20, max_eval_prompts=2)
    assert [prompt.prompt_id for prompt in data.train] == ["train:1"]
    assert [prompt.prompt_id for prompt in data.validation] == ["val:2", "val:3"]
    assert [count.dropped for count in data.counts] == [{TOO_LONG: 1}, {TOO_LONG: 1}]
    with pytest.raises(ValueError, match=r"every prompt of data.val_dataset .*train\.jsonl"):
        load(tokenizer, train, val_dataset=[train])


def test_without_a_validation_set_or_ratio_nothing_is_held_out(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [{"prompt": c} for c in "abcd"])
    assert load(tokenizer, source).validation == []
    data = load(tokenizer, source, split_dataset_ratio=0.5, max_eval_prompts=1)
    assert (len(data.train), len(data.validation)) == (2, 1)


def prompts_of(texts: list[int]) -> list[Prompt]:
    return [Prompt(f"p:{i}", user("a"), [text]) for i, text in enumerate(texts)]


@given(
    texts=st.lists(st.integers(0, 30), min_size=2, max_size=60),
    ratio=st.floats(0.01, 0.5),
    seed=st.integers(0, 100),
)
def test_a_split_loses_nothing_shares_no_text_and_depends_on_the_seed_alone(texts, ratio, seed):
    prompts = prompts_of([0, 1, *texts])
    most_common = Counter(p.token_ids[0] for p in prompts).most_common(1)[0][1]
    wanted = max(1, round(ratio * len(prompts)))
    try:
        train, validation = split_prompts(prompts, ratio, seed=seed)
    except ValueError:
        assert len(prompts) - most_common < wanted  # one text makes up most of the rows
        return
    assert sorted(p.prompt_id for p in train + validation) == sorted(p.prompt_id for p in prompts)
    assert not {p.token_ids[0] for p in train} & {p.token_ids[0] for p in validation}
    assert 0 <= len(validation) - wanted < most_common
    assert (train, validation) == split_prompts(prompts, ratio, seed=seed)


def test_a_split_with_nothing_left_to_train_on(tokenizer):
    with pytest.raises(ValueError, match=r"3 rows with 1 different prompt\."):
        split_prompts(prompts_of([5, 5, 5]), 0.5, seed=0)


@pytest.mark.parametrize(
    "source", ["no_such.jsonl", "data/no_such.parquet", "./no_such", "/no/such"]
)
def test_a_missing_file_is_named(tokenizer, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"dataset '{source}' does not exist"):
        load(tokenizer, source)


def test_a_hub_dataset_that_cannot_be_loaded_is_named(tokenizer, tmp_path):
    # An empty folder takes the same way as the id of a hub's dataset, without the network.
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"dataset '.*empty': .*could not be loaded"):
        load(tokenizer, str(tmp_path / "empty"))


def test_a_dataset_without_prompts_lists_its_columns(tokenizer, tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "level": 3}]
    source = write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match="has none of the columns messages") as caught:
        load(tokenizer, source)
    assert "question, answer, level" in str(caught.value)
    assert "Set data.columns to {question: prompt}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2  # once, not for every row


def test_an_empty_dataset_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"train\.jsonl' has no rows"):
        load(tokenizer, write_jsonl(tmp_path / "train.jsonl", []))


def test_bad_rows_are_listed_together_with_their_lines(tokenizer, tmp_path):
    rows = [
        {"messages": user("a")},
        {"messages": []},
        {"messages": [*user("a"), {"role": "system", "content": "b"}]},
        {"messages": [{"role": "User", "content": "a"}]},
        {"messages": user("  ")},
        {"messages": [{"role": "tool", "content": "a"}, *user("b")]},
        {"answer": 1},
        {"messages": user("a"), "images": ["a.png"]},
        {"messages": user([{"type": "text", "text": "a"}, {"type": "image", "image": "b"}])},
    ]
    source = write_jsonl(tmp_path / "train.jsonl", rows)
    with Path(source).open("ab") as file:
        file.write(b'\n{"prompt": "\xff"}\n{"prompt": NaN}\n')
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": [*user("a"), *assistant("b")]}])
    with pytest.raises(ValueError, match="the data has 12 problems") as caught:
        load(tokenizer, source, other, "no_such.jsonl")
    _, *found = str(caught.value).splitlines()
    expected = [
        "train.jsonl, line 2: expected a list of messages or a prompt, found []",
        "train.jsonl, line 3: the messages end with a turn of 'system'",
        "train.jsonl, line 4: a message is {'role': one of system, user",
        "train.jsonl, line 5: the user message has no text",
        "train.jsonl, line 6: the chat template refuses it: no tools here",
        "train.jsonl, line 7: has no prompt: none of messages",
        "train.jsonl, line 8: has images (the column 'images' is not empty)",
        "train.jsonl, line 9: a message has a part of type 'image'",
        "train.jsonl, line 11: is not a text in UTF-8: byte 13 is 0xff",
        "train.jsonl, line 12: not JSON: NaN is not a JSON value",
        "... and 2 more",
    ]
    assert len(found) == len(expected)
    for line, words in zip(found, expected, strict=True):
        assert words in line


@pytest.mark.parametrize("bad", [None, 3, "", [], ["a"], [{"role": "user"}], {"role": "user"}])
def test_prompts_of_a_wrong_type(tokenizer, tmp_path, bad):
    source = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": bad}])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: "):
        load(tokenizer, source)


def test_a_long_list_of_bad_rows_is_cut(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [{"prompt": n} for n in range(100)])
    with pytest.raises(ValueError, match=r"the data has 100 problems(.|\n)*and 90 more") as caught:
        load(tokenizer, source)
    assert len(str(caught.value).splitlines()) == 12


@pytest.mark.parametrize(
    ("copies", "also"),
    [
        (1, ""),
        (3, " (also line 2, line 3)"),
        (100, " (also line 2, line 3, line 4, line 5 and 95 more rows)"),
    ],
)
def test_rows_with_the_same_problem_are_one(tokenizer, tmp_path, copies, also):
    source = write_jsonl(tmp_path / "train.jsonl", [{"prompt": ""}] * copies + [{"prompt": 3}])
    with pytest.raises(ValueError, match="the data has 2 problems") as caught:
        load(tokenizer, source)
    _, same, other = str(caught.value).splitlines()
    assert f"{source}, line 1: " in same
    assert same.endswith(also)
    assert ("also" in same) == bool(also)
    assert f"{source}, line {copies + 1}: " in other


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"a\.jsonl, line 3: not JSON"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"prompt": "a"\r\n',
            r"a\.jsonl, line 2: not JSON: Expecting ',' delimiter at column 15\b",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n["b"]\n', r"a\.jsonl, line 2: expected a JSON object"),
        ("a.json", b'[{"prompt": "a"}', r"a\.json: not JSON"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), r"line 1: is not .* UTF-8.*UTF-16"),
        ("a.jsonl", b'{"prompt": "\\ud83d"}', r"line 1: .*half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, r"line 1: .*nested too deeply"),
        ("a.jsonl", b'{"prompt": 1' + b"0" * 5_000 + b"}", r"a\.jsonl, line 1: not JSON that can"),
        ("a.json", b'[{"prompt": 1' + b"0" * 5_000 + b"}]", r"a\.json: not JSON that can be read"),
        ("a.jsonl", b'{"prompt": "a", "n": 1, "n": 2}', r"a\.jsonl, line 1: .* key 'n' twice"),
        ("a.jsonl", b'{"prompt": "a", "n": {"m": 1, "m": 1}}', r"line 1: .* key 'm' twice"),
        (
            "a.csv",
            b"prompt,,n\na,,1\na,b,1\n",
            r"a\.csv, line 3: has 'b' in column 2, which has no",
        ),
        ("a.csv", "prompt,n\na,1\n".encode("utf-16"), r"a\.csv is not .* UTF-8 .*UTF-16"),
        ("a.parquet", b"text", r"a\.parquet is not a Parquet file"),
        ("a.arrow", b"text", r"a\.arrow is not an Arrow file"),
        ("a.csv", b"prompt,n\na\n", r"a\.csv, line 2: has 1 cells, and the header 2"),
        ("a.csv", b'prompt,n\n"a"b,1\n', r"a\.csv, line 2: not CSV"),
        ("a.csv", b"prompt\na\xff\n", r"a\.csv, line 2: is not a text in UTF-8.* 0xff"),
        ("a.csv", b"prompt;n\na;1\n", r"a\.csv, line 1: the header has no comma"),
        ("a.csv", b"prompt,prompt\na,b\n", r"a\.csv, line 1: the column 'prompt' is there twice"),
        ("a.txt", b"prompt\na\n", r"a\.txt' must be a file in \.jsonl, \.json, \.csv"),
    ],
)
def test_files_that_cannot_be_read(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tokenizer, str(tmp_path / name))


def test_the_index_that_pandas_writes_is_not_a_column(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text(",prompt,n\n0,a,1\n1,b,2\n")
    data = load(tokenizer, str(tmp_path / "a.csv"))
    assert [prompt.columns for prompt in data.train] == [{"n": "1"}, {"n": "2"}]


def test_a_tokenizer_without_a_chat_template(tokenizer, tmp_path):
    from copy import copy

    bare = copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        load(bare, write_jsonl(tmp_path / "train.jsonl", [{"messages": user("a")}]))
