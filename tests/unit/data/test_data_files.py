"""Rows as people save them: the same prompts, or one error that says what is wanted."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from data_cases import load, user, word_tokenizer, write_jsonl

from rlsys.config import DataConfig
from rlsys.preflight.data import count_rows

ROWS = [{"prompt": c, "answer": {"n": [n, None]}} for n, c in enumerate("abc")]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def lines(rows=ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(lines(), id="lines"),
        pytest.param("\ufeff" + lines().replace("\n", "\r\n\r\n") + " \n", id="BOM, CRLF, blanks"),
        pytest.param("\n\n".join(json.dumps(row, indent=2) for row in ROWS), id="pretty objects"),
        pytest.param(json.dumps(ROWS), id="list"),
        pytest.param(json.dumps(ROWS, indent=2) + "\n", id="pretty list"),
        pytest.param("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]", id="list of lines"),
        pytest.param(json.dumps({"data": ROWS}), id="wrapped"),
        pytest.param(json.dumps({"any name": ROWS}, indent=1), id="wrapped alone"),
        pytest.param(json.dumps({"train": {"data": ROWS}}), id="wrapped twice"),
        pytest.param(json.dumps(dict(enumerate(ROWS))), id="numbered"),
        pytest.param(json.dumps({"version": "1", "data": ROWS, "tags": []}), id="wrapped, beside"),
        pytest.param(
            json.dumps({"rows": [{"row_idx": n, "row": row} for n, row in enumerate(ROWS)]}),
            id="the hub's viewer",
        ),
    ],
)
def test_json_in_every_layout_gives_the_same_rows(tokenizer, tmp_path, suffix, text):
    path = tmp_path / f"a{suffix}"
    path.write_text(text, newline="")
    prompts = load(tokenizer, str(path)).train
    assert [prompt.messages for prompt in prompts] == [user(row["prompt"]) for row in ROWS]
    assert [prompt.columns for prompt in prompts] == [{"answer": row["answer"]} for row in ROWS]
    assert [prompt.prompt_id for prompt in prompts] == ["a:1", "a:2", "a:3"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": user("a")},
        {"dialog": user("a")},
        {"prompt": "a", "data": [{"n": 1}]},
        {"prompt": user("a"), "nums": [1]},
        {"question": "a", "answers": [{"text": "b"}]},
    ],
)
def test_an_object_with_a_list_may_be_a_row(tokenizer, tmp_path, row):
    (tmp_path / "a.json").write_text(json.dumps(row, indent=2))
    renamed = {name: "messages" for name in row if name == "dialog"}
    renamed |= {name: "prompt" for name in row if name == "question"}
    [prompt] = load(tokenizer, str(tmp_path / "a.json"), columns=renamed).train
    assert prompt.messages == user("a")


COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_compressed_text_files_are_read(tokenizer, tmp_path, suffix, kind):
    delimiter = {"csv": ",", "tsv": "\t"}.get(kind)
    content = {"jsonl": lines(), "json": json.dumps(ROWS, indent=2)}.get(kind)
    if delimiter:
        content = f"prompt{delimiter}answer\n" + "".join(f"{c}{delimiter}1\n" for c in "abc")
    path = tmp_path / f"train.{kind}.{suffix}"
    path.write_bytes(COMPRESSORS[suffix](content.encode()))
    prompts = load(tokenizer, str(path)).train
    assert [prompt.messages for prompt in prompts] == [user(c) for c in "abc"]
    assert prompts[0].prompt_id == "train:1"
    stream = load(tokenizer, str(path), streaming=True, shuffle=False).streams[0]
    assert [prompt.messages for prompt in stream.take(3)] == [user(c) for c in "abc"]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_file_that_cannot_be_decompressed_is_named(tokenizer, tmp_path, suffix):
    path = tmp_path / f"train.jsonl.{suffix}"
    whole = COMPRESSORS[suffix](lines([{"prompt": str(n)} for n in range(5000)]).encode())
    for content in (lines().encode(), whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"train\.jsonl\.{suffix} cannot be decompressed: "):
            load(tokenizer, str(path))


def test_a_compressed_file_in_a_folder(tokenizer, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl.gz").write_bytes(gzip.compress(lines().encode()))
    data = load(tokenizer, str(tmp_path / "folder"))
    assert [prompt.columns for prompt in data.train] == [{"answer": row["answer"]} for row in ROWS]


PRETTY = json.dumps({"prompt": "a", "n": 1}, indent=2)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.jsonl",
            PRETTY + "\n" + PRETTY[:-2],
            "not JSON: Expecting ',' delimiter at line 7, col",
        ),
        ("a.json", "[\n{},\n]", "at line 3, column 1; remove the comma before it"),
        ("a.jsonl", '{"prompt": "a"},\n{"prompt": "b"},\n', "Extra data at column 16; objects on"),
        (
            "a.json",
            '{"prompt": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}',
            "columns (prompt, n)",
        ),
        (
            "a.jsonl",
            '{"prompt": ["a", "b"], "n": [1, 2]}',
            "it holds columns (prompt, n), as pandas",
        ),
        ("a.json", '{"columns": ["prompt"], "index": [0], "data": [["a"]]}', "as pandas' to_json"),
        (
            "a.json",
            json.dumps({"train": ROWS, "test": ROWS}),
            "it holds several lists (train, test). Write each into a file of its own",
        ),
    ],
)
def test_a_file_without_rows_is_one_error(tokenizer, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="the data has 1 problem") as caught:
        load(tokenizer, str(tmp_path / name))
    _, problem = str(caught.value).splitlines()
    assert words in problem
    assert str(tmp_path / name) in problem
    assert "one a line" in problem


def test_a_broken_line_does_not_make_a_file_of_lines_something_else(tokenizer, tmp_path):
    rows = ['{"prompt": "a"', '{"prompt": "b"}', '{"prompt": ']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="the data has 2 problems") as caught:
        load(tokenizer, str(tmp_path / "a.jsonl"))
    for number, line in zip((1, 3), str(caught.value).splitlines()[1:], strict=True):
        assert f"line {number}: not JSON" in line


def test_only_rows_that_are_lines_are_counted_as_lines(tmp_path):
    pretty = tmp_path / "pretty.jsonl"
    pretty.write_text(json.dumps(ROWS, indent=2))
    assert count_rows(DataConfig(dataset=[str(pretty)])) is None
    assert count_rows(DataConfig(dataset=[write_jsonl(tmp_path / "a.jsonl", ROWS)])) == 3


def test_other_compressed_files_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a file in .* compressed \(\.gz, \.bz2, \.xz"):
        load(tokenizer, str(tmp_path / "a.parquet.gz"))
    with pytest.raises(ValueError, match=r"dataset 'no/such\.jsonl\.gz' does not exist"):
        load(tokenizer, "no/such.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "is a .gz file by its first bytes: rename it"),
        ("a.csv", COMPRESSORS["zst"](b"a" * 99), "is a .zst file by its first bytes"),
        ("a.jsonl", b"PAR1....", "is a .parquet file by its first bytes"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            "fetch it with git lfs pull",
        ),
        ("a.json", b"\n<!DOCTYPE html>\n<html>\n", "is a web page, not rows"),
    ],
)
def test_a_file_of_something_else_is_one_error(tokenizer, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="the data has 1 problem") as caught:
        load(tokenizer, str(tmp_path / name))
    assert f"{tmp_path / name}' is a" in str(caught.value)
    assert words in str(caught.value)
