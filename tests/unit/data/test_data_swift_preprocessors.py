"""ms-swift's preprocessors and registered datasets, with the import line changed."""

import json

import pytest
from config_cases import values
from data_cases import load, user, word_tokenizer, write_jsonl

from rlsys.config import Config, DataConfig
from rlsys.data import (
    AlpacaPreprocessor,
    AutoPreprocessor,
    DatasetMeta,
    MessagesPreprocessor,
    ResponsePreprocessor,
    RowPreprocessor,
    SubsetDataset,
    preprocessors,
    register_dataset,
)
from rlsys.data.load import load_prompts
from rlsys.data.preprocess import open_dataset
from rlsys.data.registered import registered_datasets
from rlsys.data.row import LEFT_OUT
from rlsys.plugins.load import load_plugins
from rlsys.preflight.data import count_rows
from rlsys.preflight.hub import use_cache_without_hub

COUNTDOWN = """
from typing import Any, Dict

from rlsys.data import DatasetMeta, ResponsePreprocessor, register_dataset


class CoundownTaskPreprocessor(ResponsePreprocessor):

    def preprocess(self, row: Dict[str, Any]) -> Dict[str, Any]:
        numbers = row['nums']
        target = row.pop('response', None)
        query = f"Using the numbers {numbers}, create an equation that equals {target}."
        row.update({'target': target, 'query': query})
        return super().preprocess(row)


register_dataset(
    DatasetMeta(
        ms_dataset_id='zouxuhong/Countdown-Tasks-3to4',
        subsets=['default'],
        preprocess_func=CoundownTaskPreprocessor(),
        tags=['math']))
"""
ASKED = "Using the numbers [44, 19, 35], create an equation that equals 98."


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(autouse=True)
def forget_what_is_registered():
    before = dict(preprocessors.data), list(registered_datasets)
    yield
    preprocessors.data.clear()
    preprocessors.data.update(before[0])
    registered_datasets[:] = before[1]


@pytest.fixture
def countdown(tmp_path, monkeypatch):
    """The working directory of somebody who has the data and the plugin of ms-swift's users."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "countdown.py").write_text(COUNTDOWN)
    return {"external_plugins": [str(tmp_path / "countdown.py")]}


ROWS = [{"target": 98, "nums": [44, 19, 35]}]


@pytest.mark.parametrize(
    ("dataset", "file", "options"),
    [
        # A clone of the repository in the working directory, under its whole name, or elsewhere.
        ("zouxuhong/Countdown-Tasks-3to4", "zouxuhong/Countdown-Tasks-3to4/train.jsonl", {}),
        ("sets/Countdown-Tasks-3to4#1", "sets/Countdown-Tasks-3to4/train.jsonl", {}),
        ("a.jsonl", "a.jsonl", {"preprocessor": ["zouxuhong/Countdown-Tasks-3to4"]}),
        ("a.jsonl", "a.jsonl", {"preprocessor": ["countdown.py:CoundownTaskPreprocessor"]}),
    ],
)
def test_the_countdown_preprocessor_finds_the_target(tokenizer, countdown, dataset, file, options):
    from pathlib import Path

    write_jsonl(Path(file), ROWS)
    [prompt] = load(tokenizer, dataset, **countdown, **options).train
    assert prompt.messages == user(ASKED)
    assert prompt.columns == {"nums": [44, 19, 35], "target": 98}


def test_a_dataset_of_modelscope_alone_is_read_from_there(countdown):
    name = "zouxuhong/Countdown-Tasks-3to4"
    load_plugins(countdown["external_plugins"])
    for text, from_modelscope in ((name, True), (f"ms::{name}", True), (f"hf::{name}", False)):
        spec, preprocessor = open_dataset(f"{text}#5", "none")
        assert (spec.name, spec.from_hub, spec.num_rows) == (name, True, 5)
        assert spec.from_modelscope is from_modelscope
        assert preprocessor is not None


@pytest.mark.parametrize(
    ("row", "prepared"),
    [
        ({"Question": "a", "ANSWER": "b"}, {"query": "a", "response": "b"}),
        ({"instruction": "a", "targets": 3}, {"query": "a", "response": 3}),
        # Two columns of one meaning keep their names, so that a class can tell them apart.
        ({"question": "a", "input": "b"}, {"question": "a", "input": "b"}),
        ({"query": "a", "prompt": "b"}, {"query": "a", "prompt": "b"}),
        ({"problem": "a", "answer": 1, "target": 2}, {"query": "a", "answer": 1, "target": 2}),
        ({"problem": "a", "nums": [1]}, {"query": "a", "nums": [1]}),
        ({"system_prompt": "s", "text": "t"}, {"system": "s", "response": "t"}),
    ],
)
def test_columns_are_renamed_before_preprocess(row, prepared):
    class Seen(ResponsePreprocessor):
        def preprocess(self, row):
            return row

    assert Seen()(dict(row)) == prepared
    assert RowPreprocessor()(dict(row)) == row


def test_columns_that_are_given_come_first():
    class Seen(ResponsePreprocessor):
        def preprocess(self, row):
            return row

    row = {"Q": "a", "prompt": "b", "x": 1}
    assert Seen(columns={"q": "query"})(row) == {"query": "a", "prompt": "b", "x": 1}


def test_solution_outlives_its_renaming():
    made = ResponsePreprocessor()({"question": "a", "solution": "4"})
    assert made["messages"] == [*user("a"), {"role": "assistant", "content": "4"}]
    assert made["solution"] == "4"
    assert ResponsePreprocessor()({"question": "a", "answer": 4})["solution"] == 4


@pytest.mark.parametrize(
    ("preprocessor", "row", "turns"),
    [
        (
            ResponsePreprocessor(),
            {"query": "c", "history": "[['a', 'b']]", "system": "s"},
            "system:s user:a assistant:b user:c",
        ),
        (AlpacaPreprocessor(), {"instruction": "a", "input": "b"}, "user:a\nb"),
        (AlpacaPreprocessor(), {"instruction": "a", "input": "", "output": "b"}, "user:a"),
        (AlpacaPreprocessor(), {"instruction": "a", "output": "b"}, "user:a"),
        (
            MessagesPreprocessor(),
            {"conversations": [{"from": "human", "value": "a"}], "system_prompt": "s"},
            "system:s user:a",
        ),
        (
            MessagesPreprocessor(user_role="q", role_key="who", content_key="says"),
            {"messages": [{"who": "q", "says": "a"}]},
            "user:a",
        ),
        (
            MessagesPreprocessor(inner_key="turns"),
            {"conversation": {"turns": [{"human": "a", "assistant": "b"}, {"human": "c"}]}},
            "user:a assistant:b user:c",
        ),
        (
            MessagesPreprocessor(repair_messages=json.loads),
            {"messages": '[{"role": "user", "content": "a"}]'},
            "user:a",
        ),
        (AutoPreprocessor(columns={"q": "question"}), {"q": "a", "answer": "b"}, "user:a"),
        (AutoPreprocessor(), {"instruction": "a", "input": "b", "output": "c"}, "user:a\nb"),
        (AutoPreprocessor(), {"conversations": [{"from": "human", "value": "a"}]}, "user:a"),
    ],
)
def test_prompts_of_each_class(tokenizer, tmp_path, preprocessor, row, turns):
    source = write_jsonl(tmp_path / "a.jsonl", [row])
    register_dataset(DatasetMeta(dataset_path=source, preprocess_func=preprocessor))
    [prompt] = load(tokenizer, source).train
    assert " ".join(f"{m['role']}:{m['content']}" for m in prompt.messages) == turns


def test_none_leaves_a_row_out_and_a_class_does_as_well_as_an_instance(tokenizer, tmp_path):
    class Short(ResponsePreprocessor):
        def preprocess(self, row):
            return super().preprocess(row) if len(row["query"]) < 3 else None

    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "a"}, {"question": "a b c"}])
    register_dataset(DatasetMeta(dataset_path=source, dataset_name="short", preprocess_func=Short))
    data = load(tokenizer, "short#2")
    assert data.summary()[0].startswith("data: short#2 through Short: 1 of 2 rows used")
    assert [p.messages for p in data.train] == [user("a")]
    assert data.counts[0].dropped == {LEFT_OUT: 1}
    preprocessors["instance"] = Short()
    assert load(tokenizer, source, preprocessor=["instance"]).counts[0].dropped[LEFT_OUT] == 1


def test_prepare_dataset_gets_all_renamed_rows(tokenizer, tmp_path):
    class Longest(ResponsePreprocessor):
        def prepare_dataset(self, dataset):
            most = max(map(len, dataset["query"]))
            return dataset.filter(lambda row: len(row["query"]) == most).add_column("most", [most])

    rows = [{"question": "a"}, {"question": "a b", "x": 1}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    preprocessors["longest"] = Longest
    [prompt] = load(tokenizer, source, preprocessor=["longest"]).train
    assert prompt.messages == user("a b")
    assert prompt.columns == {"x": 1, "most": 3}

    class Broken(Longest):
        def prepare_dataset(self, dataset):
            return dataset["nothing"]

    preprocessors["broken"] = Broken
    with pytest.raises(
        ValueError, match=r"Broken.prepare_dataset raised .*_preprocessors.py, line"
    ):
        load(tokenizer, source, preprocessor=["broken"])


SUBSETS = [SubsetDataset("small", "sm"), SubsetDataset("large", "lg", split=["test"]), "weak"]


@pytest.mark.parametrize(
    ("entry", "meta", "spec"),
    [
        ("mine", {}, ("a/b", (), None)),
        ("mine:x:test", {}, ("a/b", ("x",), "test")),
        ("a/b", {"split": ["dev"]}, ("a/b", (), "dev")),
        ("mine:small", {"subsets": SUBSETS}, ("a/b", ("sm",), None)),
        ("mine:large", {"subsets": SUBSETS}, ("a/b", ("lg",), "test")),
        ("mine:small/large:dev", {"subsets": SUBSETS}, ("a/b", ("sm", "lg"), "dev")),
        ("mine", {"subsets": ["default", "other"]}, ("a/b", (), None)),
        ("mine:all", {"subsets": ["one", "two"]}, ("a/b", ("one", "two"), None)),
        ("mine", {"subsets": SUBSETS}, "the subsets small, large, weak: name some, as mine:small"),
        ("mine", {"split": ["train", "test"]}, "one entry for each, as mine::SPLIT"),
        ("mine", {"preprocess_func": print}, "derive a class from RowPreprocessor"),
    ],
)
def test_subsets_and_splits_of_a_registered_dataset(entry, meta, spec):
    register_dataset(DatasetMeta(hf_dataset_id="a/b", dataset_name="mine", **meta))
    if isinstance(spec, str):
        with pytest.raises(ValueError, match=spec):
            open_dataset(entry, "none")
    else:
        found, _ = open_dataset(entry, "none")
        assert (found.name, found.subsets, found.split) == spec
        assert found.from_hub


def test_what_is_ignored_is_refused():
    for options in ({"loader": print}, {"hf_revision": "main"}):
        with pytest.raises(ValueError, match=r"is not supported. Write the rows into a file"):
            DatasetMeta(hf_dataset_id="a/b", **options)
    with pytest.raises(ValueError, match="has no name"):
        DatasetMeta()
    with pytest.raises(ValueError, match="write #5 behind the dataset"):
        ResponsePreprocessor(dataset_sample=5)
    register_dataset(DatasetMeta(dataset_name="a"))
    with pytest.raises(ValueError, match="'a' is registered twice"):
        register_dataset(DatasetMeta(dataset_name="a"))
    register_dataset(DatasetMeta(dataset_name="a", help="newer"), exist_ok=True)
    assert [meta.help for meta in registered_datasets if "a" in meta.names] == ["newer"]


@pytest.mark.parametrize("field", ["dataset", "val_dataset"])
def test_rows_without_a_prompt_name_what_the_plugin_registers(
    tokenizer, countdown, field, tmp_path
):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "good.jsonl", [{"prompt": "a"}])
    datasets = {"dataset": ["good.jsonl"], "val_dataset": []} | {field: ["train.jsonl"]}
    config = DataConfig(**datasets, **countdown)
    with pytest.raises(ValueError, match="has none of the columns") as caught:
        load_prompts(config, tokenizer, seed=0)
    assert "--data.preprocessor zouxuhong/Countdown-Tasks-3to4" in str(caught.value)


def test_registered_datasets_are_known_preprocessors(tokenizer, countdown, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match="Known: zouxuhong/Countdown-Tasks-3to4"):
        load(tokenizer, "train.jsonl", preprocessor=["CoundownTaskPreprocessor"], **countdown)


def test_a_dataset_path_that_does_not_exist_is_not_a_hub_id(tokenizer, countdown, tmp_path):
    plugin = COUNTDOWN.replace("subsets=['default']", "dataset_path='train.jsonl'")
    (tmp_path / "countdown.py").write_text(plugin)
    for entry in ("zouxuhong/Countdown-Tasks-3to4", "train.jsonl"):
        with pytest.raises(ValueError, match=r"dataset_path 'train\.jsonl' does not") as caught:
            load(tokenizer, entry, **countdown)
        assert f"looked for {tmp_path / 'train.jsonl'}" in str(caught.value)


def test_a_registered_name_of_a_file_asks_no_hub(countdown, tmp_path, monkeypatch, capsys):
    """Its note would say that the rows come from the cache."""
    plugin = COUNTDOWN.replace("subsets=['default']", "dataset_path='train.jsonl'")
    (tmp_path / "countdown.py").write_text(plugin)
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "model").mkdir()
    data = {"dataset": ["zouxuhong/Countdown-Tasks-3to4"], **countdown}
    config = Config.model_validate(values(data=data, model={"path": str(tmp_path / "model")}))
    monkeypatch.setattr("rlsys.preflight.hub.hub_answers", lambda: pytest.fail("the hub was asked"))
    use_cache_without_hub(config)
    assert count_rows(config.data) == 1
    assert capsys.readouterr().out == ""
