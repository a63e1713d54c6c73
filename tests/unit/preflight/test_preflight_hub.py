"""Datasets and models by their hub ids, from a stand-in for the hub with its real clients."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from config_cases import MODEL_SIZES, values
from data_cases import word_tokenizer
from hub_server import hub

from rlsys.config import Config
from rlsys.config.local_paths import with_absolute_paths
from rlsys.model.folder import find_model_folder, resolve_model_path, tokenizer_source

CARD = """---
configs:
- config_name: easy
  data_files:
  - {split: train, path: easy/train.jsonl}
  - {split: test, path: easy/test.jsonl}
- config_name: hard
  data_files:
  - {split: train, path: hard/train.jsonl}
  - {split: test, path: hard/test.jsonl}
---
"""
PREVIEWS = """
import contextlib, io, json, sys
from rlsys.cli import main

results = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["data", "preview", "run.yaml", *words])
    results.append([code, " ".join(out.getvalue().split())])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory, and in `hub` the repositories of a hub."""
    folder = tmp_path_factory.mktemp("hub")
    model = folder / "hub/models/tiny/model"
    word_tokenizer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps(MODEL_SIZES))
    dataset = folder / "hub/datasets/tiny/sums"
    letters = iter("abcd")
    for subset in ("easy", "hard"):
        (dataset / subset).mkdir(parents=True)
        for split in ("train", "test"):
            letter = next(letters)
            rows = [
                {
                    "prompt": f"{letter} " * (n + 1),
                    "nums": [n],
                    "target": n,
                    "of": f"{subset}-{split}",
                }
                for n in range(5)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (dataset / subset / f"{split}.jsonl").write_text(lines)
    (dataset / "README.md").write_text(CARD)
    # Its tokenizer cannot spell the tags that the rewards look for.
    run = values(model={"path": "tiny/model"}, reward={"on_error": "zero"})
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def previews(folder, endpoint, *commands, **environment):
    """`rlsys data preview` with each of the words: exit code and output."""
    done = subprocess.run(
        [sys.executable, "-c", PREVIEWS, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": "home", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_hub_ids_are_downloaded_or_reported_in_one_clear_error(folder):
    with hub(folder / "hub", gated=("tiny/asked", "tiny/secret")) as endpoint:
        easy, part, streamed, *failed = previews(
            folder,
            endpoint,
            ["--data.dataset", "tiny/sums:easy", "--data.val_dataset", "tiny/sums:hard"],
            ["--data.dataset", "tiny/sums:hard:test#3"],
            ["--data.dataset", "tiny/sums:hard", "--data.streaming"],
            ["--data.dataset", "tiny/none"],
            ["--data.dataset", "tiny/asked"],
            ["--data.dataset", "tiny/sums:no_such"],
            ["--data.dataset", "tiny/sums:easy:no_such"],
            ["--data.dataset", "tiny/sums:easy", "--model.path", "tiny/none"],
            ["--data.dataset", "tiny/sums:easy", "--model.path", "tiny/secret"],
        )
        assert [easy[0], part[0], streamed[0]] == [0, 0, 0], (easy, part, streamed)
        assert "5 prompts to train on, 5 to evaluate on" in easy[1]
        assert "easy-train" in easy[1]
        assert "3 prompts to train on" in part[1]
        assert "hard-test" in part[1]
        assert "hard-train" in streamed[1]
        for (code, output), (dataset, says) in zip(
            failed,
            [
                ("tiny/none", "doesn't exist on the Hub or cannot be accessed"),
                ("tiny/asked", "is a gated dataset"),
                ("tiny/sums:no_such", "'no_such' not found. Available: ['easy', 'hard']"),
                ("tiny/sums:easy:no_such", "has no split 'no_such', only train, test"),
                ("tiny/none", "the hub does not have it"),
                ("tiny/secret", "it is gated: ask for access"),
            ],
            strict=True,
        ):
            assert code == 2
            assert dataset in output
            assert says in output
            assert "Traceback" not in output
    # Without the hub, downloads are used, and everything else is reported as missing.
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        known, new = previews(
            folder,
            endpoint,
            ["--data.dataset", "tiny/sums:easy"],
            ["--data.dataset", "tiny/other"],
            **environment,
        )
        assert known[0] == 0, known
        assert "5 prompts to train on" in known[1]
        assert ("hub does not answer" in known[1]) == (not environment)
        assert new[0] == 2
        assert "dataset 'tiny/other': no file here, and the Hugging Face hub's dataset" in new[1]
        assert "Traceback" not in new[1]


@pytest.mark.slow
def test_ids_of_modelscope_are_downloaded_or_reported_in_one_clear_error(folder):
    pytest.importorskip("modelscope", reason="the optional package modelscope")
    whole, mixed = ["--hub", "modelscope"], ["--model.path", "ms::tiny/model"]
    known = [*whole, "--data.dataset", "tiny/sums:easy", "--data.val_dataset", "tiny/sums:hard"]
    with hub(folder / "hub") as endpoint:
        places = {"MODELSCOPE_ENDPOINT": endpoint, "MODELSCOPE_CACHE": "modelscope"}
        # No Hugging Face hub answers: each of these ids has to come from ModelScope.
        done = previews(
            folder,
            "http://127.0.0.1:9",
            known,
            [*mixed, "--data.dataset", "ms::tiny/sums:hard:test#3"],
            [*whole, "--data.dataset", "tiny/none"],
            [*whole, "--data.dataset", "tiny/sums:easy", "--model.path", "tiny/none"],
            **places,
        )
    easy, part, no_dataset, no_model = done
    assert easy[0] == 0, easy
    assert "5 prompts to train on, 5 to evaluate on" in easy[1]
    assert "easy-train" in easy[1]
    assert part[0] == 0, part
    assert "3 prompts to train on" in part[1]
    assert "hard-test" in part[1]
    for (code, output), kind in ((no_dataset, "dataset"), (no_model, "model")):
        assert code == 2
        assert f"'tiny/none' is not a {kind} of ModelScope that can be read" in output
        assert "Traceback" not in output
    # Without ModelScope downloads are used.
    again, new = previews(
        folder,
        "http://127.0.0.1:9",
        known,
        [*whole, "--data.dataset", "tiny/other"],
        **places,
    )
    assert again[0] == 0, again
    assert "5 prompts to train on" in again[1]
    assert new[0] == 2
    assert "ModelScope does not answer, and it was not downloaded before" in new[1]


def test_without_the_package_an_id_of_modelscope_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    for read in (find_model_folder, resolve_model_path, tokenizer_source):
        with pytest.raises(ValueError, match=r"pip install 'rlsys\[modelscope\]'") as caught:
            read("ms::tiny/model")
        assert "'tiny/model' is a model of ModelScope" in str(caught.value)


def test_the_hub_of_a_config_is_written_before_its_ids_and_not_before_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/model").mkdir(parents=True)
    config = Config.model_validate(
        values(
            hub="modelscope",
            model={"path": "Qwen/Qwen3-0.6B"},
            reference={"path": "here/model"},
            data={"dataset": ["a/b:x#5", "hf::a/b", "./rows.jsonl", "rows.jsonl"]},
            reward={"reward_funcs": ["format"], "reward_model": ["a/rm", "./rm"]},
        )
    )
    assert config.model.path == "ms::Qwen/Qwen3-0.6B"
    assert config.reference.path == "here/model"
    assert config.data.dataset == ["ms::a/b:x#5", "hf::a/b", "./rows.jsonl", "rows.jsonl"]
    assert config.reward.model_paths == ["ms::a/rm", "./rm"]
    assert config.reward.names == ["format", "reward_model:a/rm", "reward_model:./rm"]
    # A saved config is read to the same one, and another hub's ids are left alone.
    assert Config.model_validate(config.model_dump()) == config
    assert Config.model_validate(values(model={"path": "Qwen/Q"})).model.path == "Qwen/Q"
    both = with_absolute_paths(config)
    assert both.model.path == "ms::Qwen/Qwen3-0.6B"
    assert both.reference.path == str(tmp_path / "here/model")
