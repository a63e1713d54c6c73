"""Datasets in all forms: the same rows, sampled, renamed and preprocessed as asked for."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from data_cases import assistant, load, user, word_tokenizer, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.config.dataset_spec import DatasetSpec, parse_spec
from rlsys.data import preprocessors
from rlsys.data.row import DUPLICATE, LEFT_OUT, TOO_LONG, TOO_SHORT


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def forget_preprocessors():
    registered = dict(preprocessors.data)
    yield
    preprocessors.data.clear()
    preprocessors.data.update(registered)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("data/train.jsonl", {"name": "data/train.jsonl"}),
        ("data/train.jsonl#1000", {"name": "data/train.jsonl", "num_rows": 1000}),
        ("./folder#5", {"name": "./folder", "num_rows": 5}),
        ("openai/gsm8k", {"name": "openai/gsm8k"}),
        ("openai/gsm8k:main", {"name": "openai/gsm8k", "subsets": ("main",)}),
        ("a/b:x/y#7", {"name": "a/b", "subsets": ("x", "y"), "num_rows": 7}),
        ("a/b:x:test", {"name": "a/b", "subsets": ("x",), "split": "test"}),
        ("a/b::test", {"name": "a/b", "split": "test"}),
        ("HF::a/b:x", {"name": "a/b", "subsets": ("x",), "from_hub": True}),
        ("ms::a/b#5", {"name": "a/b", "num_rows": 5, "from_hub": True, "from_modelscope": True}),
    ],
)
def test_what_an_entry_says(text, spec):
    assert parse_spec(text) == DatasetSpec(text, **spec)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jsonl#", "a number of rows"),
        ("a.jsonl#0", "not '0'"),
        ("a.jsonl#-3", "not '-3'"),
        (" ", "a dataset is empty"),
    ],
)
def test_an_entry_that_says_nothing(text, words):
    with pytest.raises(ValueError, match=words):
        parse_spec(text)


def test_a_file_whose_name_looks_like_something_else_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:b#3").write_text("")
    assert parse_spec("a:b#3") == DatasetSpec("a:b#3", "a:b#3")
    assert parse_spec("a:b#3#4") == DatasetSpec("a:b#3#4", "a:b#3", num_rows=4)


ROWS = [{"prompt": f"{c} {c}", "answer": c, "none": None} for c in "abcd"]


def write_all_kinds(folder: Path) -> list[str]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    write_jsonl(folder / "a.jsonl", ROWS)
    (folder / "b.json").write_text("\ufeff" + json.dumps(ROWS), "utf-8")
    (folder / "lines.json").write_text("".join(json.dumps(row) + "\r\n" for row in ROWS))
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, folder / "e.parquet")
    with pyarrow.ipc.new_stream(str(folder / "f.arrow"), table.schema) as stream:
        stream.write_table(table)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    write_jsonl(folder / "folder" / "train.jsonl", ROWS)
    names = ["a.jsonl", "b.json", "lines.json", "c.csv", "d.tsv", "e.parquet", "f.arrow"]
    return [str(folder / name) for name in (*names, "saved", "folder")]


def test_all_kinds_of_files_give_the_same_rows(tokenizer, tmp_path):
    for source in write_all_kinds(tmp_path):
        data = load(tokenizer, source)
        assert [p.messages[0]["content"] for p in data.train] == [r["prompt"] for r in ROWS], source
        assert [p.columns for p in data.train] == [
            {"answer": row["answer"], "none": None} for row in ROWS
        ], source
        assert not data.counts[0].dropped


def test_json_in_a_folder_keeps_its_types_and_names_its_lines(tokenizer, tmp_path):
    rows = [{"prompt": "a", "day": "2024-01-31", "n": 1}, {"prompt": "b", "day": "x", "n": 0.5}]
    write_jsonl(tmp_path / "folder" / "train.jsonl", rows)
    first, _ = load(tokenizer, str(tmp_path / "folder")).train
    assert first.columns == {"day": "2024-01-31", "n": 1}
    assert type(first.columns["n"]) is int
    write_jsonl(tmp_path / "folder" / "train.jsonl", [*rows, {"prompt": 3}])
    with pytest.raises(ValueError, match=r"folder, train\.jsonl, line 3: expected a list"):
        load(tokenizer, str(tmp_path / "folder"))


@pytest.mark.parametrize("rows", ["", "#8"])
def test_two_files_of_one_name_in_a_folder_keep_their_own_rows(tokenizer, tmp_path, rows):
    for part, texts in (("x", "ab"), ("y", "cd")):
        written = [{"prompt": text, "is": text} for text in texts]
        write_jsonl(tmp_path / "folder" / "train" / part / "part.jsonl", written)
    prompts = load(tokenizer, f"{tmp_path / 'folder'}{rows}", deduplicate=True).train
    assert sorted(p.columns["is"] for p in prompts) == sorted("abcd" * (2 if rows else 1))
    for prompt in prompts:
        words = tokenizer.decode(prompt.token_ids)
        assert words == f"<s> [ user ] {prompt.columns['is']} [ assistant ]"
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts)
    write_jsonl(tmp_path / "folder" / "train" / "y" / "part.jsonl", [{"prompt": 3}])
    with pytest.raises(ValueError, match=r"folder, train/y/part\.jsonl, line 1: expected a list"):
        load(tokenizer, str(tmp_path / "folder"))


def test_a_folder_has_splits_and_subsets(tokenizer, tmp_path):
    folder = tmp_path / "folder"
    for subset in "xy":
        for split in ("train", "test"):
            write_jsonl(folder / subset / f"{split}.jsonl", [{"prompt": "a", "is": subset + split}])
    configs = "".join(
        f"- config_name: {s}\n  data_files:\n"
        + "".join(f"  - split: {p}\n    path: {s}/{p}.jsonl\n" for p in ("train", "test"))
        for s in "xy"
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    def found(part):
        return [p.columns["is"] for p in load(tokenizer, f"{folder}{part}").train]

    assert found(":x") == ["xtrain"]
    assert found(":x/y") == ["xtrain", "ytrain"]
    assert found(":y:test") == ["ytest"]
    with pytest.raises(ValueError, match="has no split 'no', only train, test"):
        found(":y:no")
    with pytest.raises(ValueError, match="could not be loaded"):
        found("")


@given(wanted=st.integers(1, 25), seed=st.integers(0, 99))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_number_behind_a_hash_samples_as_ms_swift_does(tokenizer, tmp_path, wanted, seed):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": c} for c in "abcdefg"])
    data = load(tokenizer, f"{source}#{wanted}", seed=seed)
    rows = Counter(p.messages[0]["content"] for p in data.train)
    assert sum(rows.values()) == wanted
    assert set(rows.values()) <= {wanted // 7, wanted // 7 + 1} - {0}
    assert len({p.prompt_id for p in data.train}) == wanted
    again = load(tokenizer, f"{source}#{wanted}", seed=seed)
    assert [p.prompt_id for p in again.train] == [p.prompt_id for p in data.train]
    in_order = load(tokenizer, f"{source}#{wanted}", seed=seed, shuffle=False).train
    assert [p.messages[0]["content"] for p in in_order] == [
        ("abcdefg" * 4)[i] for i in range(wanted)
    ]


def test_samples_of_two_seeds_differ_and_evaluation_takes_the_first_rows(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a " * n} for n in range(1, 40)])
    other = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "b"}])
    one, two = (load(tokenizer, f"{source}#10", seed=seed).train for seed in (1, 2))
    assert {p.prompt_id for p in one} != {p.prompt_id for p in two}
    held_out = load(tokenizer, other, val_dataset=[f"{source}#3"]).validation
    assert [p.prompt_id for p in held_out] == ["a:1", "a:2", "a:3"]
    with pytest.raises(ValueError, match=r"has 39 rows.*ask for at most 39"):
        load(tokenizer, other, val_dataset=[f"{source}#40"])


def test_columns_get_new_names_before_anything_else(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": 1, "x": 2}])
    [prompt] = load(tokenizer, source, columns={"question": "prompt", "answer": "solution"}).train
    assert prompt.messages == user("a")
    assert prompt.columns == {"solution": 1, "x": 2}
    with pytest.raises(ValueError, match=r"'questoin', which no dataset has. Did you mean 'quest"):
        load(tokenizer, source, columns={"question": "prompt", "questoin": "x"})
    with pytest.raises(ValueError, match=r"line 1: .*the row has 'x' already"):
        load(tokenizer, source, columns={"answer": "x", "question": "prompt"})


PLUGIN = """
from rlsys.data import ResponsePreprocessor, register_preprocessor

@register_preprocessor("double")
def double(row):
    if row["word"] == "skip":
        return None
    return {"prompt": row["word"] * 2, "length": len(row["word"])}

@register_preprocessor("swift")
class Swift(ResponsePreprocessor):
    def preprocess(self, row):
        row.update({"query": row.pop("word"), "response": "x"})
        return super().preprocess(row)

@register_preprocessor("broken")
def broken(row):
    return row["nothing"]

@register_preprocessor("text")
def text(row):
    return "a text"
"""


def test_preprocessors_of_a_plugin(tokenizer, tmp_path, forget_preprocessors):
    plugin = tmp_path / "make_prompts.py"
    plugin.write_text(PLUGIN)
    options = {"external_plugins": [str(plugin)]}
    words = write_jsonl(tmp_path / "a.jsonl", [{"word": w} for w in ("a", "skip", "b")])
    plain = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "c"}])
    data = load(tokenizer, words, preprocessor=["double"], **options)
    assert [p.messages[0]["content"] for p in data.train] == ["aa", "bb"]
    assert [p.columns for p in data.train] == [{"length": 1}] * 2
    assert data.counts[0].dropped == {LEFT_OUT: 1}
    assert "dropped: 1 left out by the preprocessor" in data.summary()[0]
    both = load(tokenizer, words, plain, preprocessor=["swift", "none"], **options)
    assert [p.messages[0]["content"] for p in both.train] == ["a", "skip", "b", "c"]
    assert both.train[0].columns == {"solution": "x"}
    with pytest.raises(ValueError, match=r"line 1: .*'broken' raised KeyError: .*line 18"):
        load(tokenizer, words, preprocessor=["broken"], **options)
    with pytest.raises(ValueError, match=r"line 1: .*'text' returned 'a text'"):
        load(tokenizer, words, preprocessor=["text"], **options)
    with pytest.raises(ValueError, match=r"unknown preprocessor 'duoble'. Did you mean 'double'"):
        load(tokenizer, words, preprocessor=["duoble"], **options)


def test_duplicates_are_counted_and_the_first_stays(tokenizer, tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", [{"prompt": c, "n": i} for i, c in enumerate("abab")])
    two = write_jsonl(tmp_path / "b.jsonl", [{"prompt": c} for c in "bc"])
    data = load(tokenizer, f"{one}#8", two, deduplicate=True)
    assert [p.prompt_id for p in data.train] == ["a:1", "a:2", "a:1+1", "a:2+1", "b:2"]
    assert [count.dropped for count in data.counts] == [{DUPLICATE: 4}, {DUPLICATE: 1}]
    assert [count.used for count in data.counts] == data.train_sizes == [4, 1]
    assert len(load(tokenizer, one, two).train) == 6


def test_limits_of_length(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a " * n} for n in (1, 2, 3, 9)])
    data = load(tokenizer, source, min_prompt_length=9, max_prompt_length=12)
    assert [len(p.token_ids) for p in data.train] == [9, 10]
    assert data.counts[0].dropped == {TOO_SHORT: 1, TOO_LONG: 1}
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: the prompt has 16 tokens, more than"):
        load(tokenizer, source, max_prompt_length=12, overlong_prompts="error")


def test_a_row_that_is_too_large_is_one_problem_and_no_memory(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    large = json.dumps({"prompt": "a", "x": "y" * 10 * 2**20})
    path.write_text('{"prompt": "a"}\n' + large + '\n{"prompt": 3}\n' + large)
    with pytest.raises(ValueError, match="the data has 2 problems") as caught:
        load(tokenizer, str(path))
    _, first, second = str(caught.value).splitlines()
    assert "line 2: is larger than 8 MiB" in first
    assert first.endswith("(also line 4)")
    assert "line 3: expected a list of messages" in second
    path.write_text('{"prompt": "a"}\n' + large)
    assert len(load(tokenizer, str(path), max_row_mb=11).train) == 2


def test_every_prompt_carries_the_columns_of_all_datasets(tokenizer, tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "nums": [1]}])
    two = write_jsonl(tmp_path / "b.jsonl", [{"messages": [*user("b"), *assistant("c")]}])
    first, second = load(tokenizer, one, two).train
    assert first.columns == {"nums": [1], "solution": None}
    assert second.columns == {"nums": None, "solution": "c"}


def test_a_dataset_with_a_weight_keeps_something_to_train_on(tokenizer, tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    two = write_jsonl(tmp_path / "b.jsonl", [{"prompt": c} for c in "bcdefgh"])
    options = {"dataset_weights": [1.0, 1.0], "split_dataset_ratio": 0.9}
    with pytest.raises(ValueError, match=r"holds out every prompt of .*a\.jsonl"):
        load(tokenizer, one, two, seed=1, **options)
    sizes = [
        load(tokenizer, one, two, seed=s, split_dataset_ratio=0.5).train_sizes for s in range(9)
    ]
    assert {sum(size) for size in sizes} == {4}


def test_held_out_prompts_that_are_trained_on_are_counted(tokenizer, tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [{"prompt": c} for c in "abc"])
    held_out = write_jsonl(tmp_path / "b.jsonl", [{"prompt": c} for c in "cd"])
    data = load(tokenizer, train, val_dataset=[held_out])
    assert data.num_validation_in_train == 1
    assert "1 of 2 held-out prompts are in the training data too" in data.summary()[-1]


def test_images_in_a_table_are_refused_by_their_type(tokenizer, tmp_path):
    import datasets

    features = datasets.Features({"prompt": datasets.Value("string"), "pic": datasets.Image()})
    table = datasets.Dataset.from_dict({"prompt": ["a"], "pic": [None]}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has image data in the column 'pic'"):
        load(tokenizer, str(tmp_path / "a.parquet"))
