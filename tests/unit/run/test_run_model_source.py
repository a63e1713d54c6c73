"""What a user names as a model: a folder that can be loaded, or one clear error."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlsys.run.manifest import write_manifest
from rlsys.run.model_source import find_model


def make_model(folder):
    """Write the files of a model folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 5, 20 and 100."""
    run = tmp_path / "run"
    for step in (5, 20, 100):
        make_model(run / f"checkpoints/step-{step}")
    make_model(run / "checkpoints/step-200.partial")
    (run / "config.yaml").write_text("")
    return run


def test_a_model_folder_stands_for_itself(model):
    source = find_model(str(model))
    assert (source.folder, source.run, source.step, source.label) == (model, None, None, str(model))


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_run_stands_for_its_newest_checkpoint(run, below):
    source = find_model(str(run / below))
    assert source.folder == run / "checkpoints/step-100"
    assert (source.step, source.run.path) == (100, run)
    assert source.label == f"{run / below} step 100"


def test_a_step_of_a_run(run):
    source = find_model(str(run), 20)
    assert (source.folder, source.step) == (run / "checkpoints/step-20", 20)


def test_a_checkpoint_knows_its_run_and_step(run):
    source = find_model(str(run / "checkpoints/step-5"))
    assert (source.step, source.run.path) == (5, run.resolve())


@pytest.mark.parametrize("name", ["final", "interrupted"])
def test_weights_without_a_checkpoint_are_newest_if_written_last(run, name):
    folder = make_model(run / name)
    assert find_model(str(run)).folder == folder
    os.utime(folder / "config.json", (0, 0))
    assert find_model(str(run)).step == 100
    shutil.rmtree(run / "checkpoints")
    assert find_model(str(run)).folder == folder
    with pytest.raises(ValueError, match=rf"no checkpoint of step 3.*only {name}/"):
        find_model(str(run), 3)


def test_a_step_that_does_not_exist_names_those_that_do(run):
    with pytest.raises(ValueError, match="no checkpoint of step 7: it has 5, 20, 100"):
        find_model(str(run), 7)


def test_a_run_without_weights(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"run that has saved no weights.*no checkpoints"):
        find_model(str(tmp_path))


def test_a_step_of_something_else_is_refused(model):
    with pytest.raises(ValueError, match="--step 3 is for a run"):
        find_model(str(model), 3)
    with pytest.raises(ValueError, match="--step 3 is for a run"):
        find_model("owner/name", 3)


def test_an_unfinished_checkpoint_is_refused(run):
    folder = run / "checkpoints/step-200.partial"
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        find_model(str(folder))


def test_a_folder_that_is_neither(tmp_path):
    with pytest.raises(ValueError, match=r"neither a model folder .* nor the output_dir of a run"):
        find_model(str(tmp_path))


def test_a_file_and_a_missing_folder(tmp_path, model):
    with pytest.raises(ValueError, match="is a file: name the folder"):
        find_model(str(model / "config.json"))
    with pytest.raises(ValueError, match="no folder"):
        find_model(str(tmp_path / "nothing"))


def test_a_broken_lora_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json lacks r, lora_alpha"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "no .safetensors file"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_model_folder_that_lacks_files(model, file, message):
    (model / file).unlink()
    with pytest.raises(ValueError, match=message):
        find_model(str(model))


def test_weights_of_another_format_are_named(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"can save its pytorch_model.bin"):
        find_model(str(model))


def test_a_missing_shard_is_named(model):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks model-2.safetensors"):
        find_model(str(model))


def test_a_damaged_checkpoint_is_refused_and_other_files_named_so_are_not_read(run):
    folder = run / "checkpoints/step-100"
    (folder / "optimizer").mkdir()
    (folder / "optimizer/moments").write_text("m")
    write_manifest(folder, 100, {})
    (folder / "optimizer/moments").unlink()  # the model is whole
    assert find_model(str(run)).step == 100
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"step-100 is damaged: config\.json has .*--step"):
        find_model(str(run))
    (folder / "optimizer").rmdir()
    assert find_model(str(folder)).step == 100
