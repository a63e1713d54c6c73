"""Datasets whose files or first rows cannot be used."""

import pytest
from preflight_cases import only


def test_a_missing_data_file(problems):
    text = only(problems("--data.dataset", "nowhere.jsonl"))
    assert "data.dataset: dataset 'nowhere.jsonl' does not exist" in text
    assert "working directory" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"question": "1 + 1?"}\n', ["messages", "prompt", "{question: prompt}"]),
        ("a.jsonl", "", ["no rows"]),
        ("a.jsonl", "question\n", ["line 1: not JSON"]),
        ("a.csv", "prompt\n", ["no rows"]),
        ("a.csv", "question\na\n", ["{question: prompt}"]),
        ("a.parquet", "text", ["not a Parquet file"]),
        ("a.txt", "a", [".jsonl"]),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', ["line 2: ", "found 3"]),
    ],
)
def test_a_data_file_that_cannot_be_used(problems, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    text = only(problems("--data.val_dataset", str(path)))
    for word in words:
        assert word in text


def test_data_plugins_and_preprocessors_are_checked(problems, tmp_path):
    text = only(problems("--data.preprocessor", "word_problem"))
    assert "data.dataset: unknown preprocessor 'word_problem'" in text
    [plugin, unknown] = problems(
        "--data.external_plugins", "nowhere.py", "--data.preprocessor", "word_problem"
    )
    assert "data.external_plugins: plugin '" in plugin.text
    assert "a plugin above could not be loaded" in unknown.text
    assert plugin.only_here
    assert unknown.only_here
    assert "a number of rows belongs behind #" in only(
        problems("--data.val_dataset", "a.jsonl#many")
    )


def test_fewer_rows_than_a_step_needs(problems):
    text = only(problems(rollout={"generation_batch_size": 4 * 21}))
    assert "20 rows" in text
    assert "21 prompts" in text
