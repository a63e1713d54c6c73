"""Model folders: sliced reading, and writing that an interruption cannot spoil."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsys.engines.megatron import hf_folder as hf_checkpoint
from rlsys.engines.megatron.hf_folder import INDEX, SafetensorsReader, save_model_folder

TENSORS = {
    "model.embed_tokens.weight": torch.randn(8, 4),
    "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4),
    "model.norm.weight": torch.randn(4),
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float64"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / INDEX).write_text("{}")
    save_file({"old": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    return folder


def contents(folder):
    """All tensors of a folder, wherever they are."""
    with SafetensorsReader(folder) as reader:
        return {name: reader.shard(name, None, 0, 1) for name in reader._handle_of}


def assert_holds(folder, tensors):
    held = contents(folder)
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensors[name]) for name in tensors)


def test_a_folder_holds_the_weights_and_all_else_of_its_source(source, tmp_path):
    target = tmp_path / "run" / "final"
    save_model_folder(source, target, iter(TENSORS.items()), torch.float32)
    assert_holds(target, TENSORS)
    names = {path.name for path in target.iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    config = json.loads((target / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "float32"}
    assert [path.name for path in target.parent.iterdir()] == ["final"]


@pytest.mark.parametrize("limit", [1, 16, 100, 230])
def test_large_models_are_cut_into_shards_with_an_index(source, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(hf_checkpoint, "MAX_SHARD_BYTES", limit)
    target = tmp_path / "target"
    save_model_folder(source, target, iter(TENSORS.items()), torch.float32)
    index = json.loads((target / INDEX).read_text())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 1
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 1 + len(files))
    ]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    held = {}
    for file in files:
        shard = load_file(target / file)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit
        held |= dict.fromkeys(shard, file)
    assert index["weight_map"] == held
    assert_holds(target, TENSORS)


def test_a_buffer_that_the_exporter_uses_again_is_copied(source, tmp_path):
    def reusing():
        buffer = torch.empty(4)
        for i in range(3):
            yield f"tensor-{i}", buffer.fill_(i)

    save_model_folder(source, tmp_path / "target", reusing(), torch.float32)
    assert_holds(tmp_path / "target", {f"tensor-{i}": torch.full((4,), float(i)) for i in range(3)})


def test_an_interrupted_save_leaves_the_earlier_folder_whole(source, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_checkpoint, "MAX_SHARD_BYTES", 100)
    target = tmp_path / "target"
    save_model_folder(source, target, iter(TENSORS.items()), torch.float32)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    changed = {name: tensor + 1 for name, tensor in TENSORS.items()}

    def failing():
        yield from list(changed.items())[:2]
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_model_folder(source, target, failing(), torch.float32)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    save_model_folder(source, target, iter(changed.items()), torch.float32)
    assert_holds(target, changed)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}


def test_being_killed_while_the_earlier_folder_is_deleted_leaves_the_new_one_whole(
    source, tmp_path, monkeypatch
):
    target = tmp_path / "target"
    save_model_folder(source, target, iter(TENSORS.items()), torch.float32)
    changed = {name: tensor + 1 for name, tensor in TENSORS.items()}

    def killed_while_deleting(path, **_):
        if path.exists():
            (path / "config.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(hf_checkpoint.shutil, "rmtree", killed_while_deleting)
    with pytest.raises(KeyboardInterrupt):
        save_model_folder(source, target, iter(changed.items()), torch.float32)
    assert_holds(target, changed)
    assert (target / "config.json").exists()


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_put_together_are_the_tensor(tmp_path, axis):
    tensor = torch.randn(8, 12)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        slices = [reader.shard("w", axis, rank, 4) for rank in range(4)]
        assert torch.equal(reader.shard("w", None, 3, 4), tensor)
    assert torch.equal(torch.cat(slices, dim=axis), tensor)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.safetensors file.*save_pretrained"):
        SafetensorsReader(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with (
        SafetensorsReader(tmp_path) as reader,
        pytest.raises(ValueError, match=r"'lm_head\.weight' is missing in"),
    ):
        reader.shard("lm_head.weight", 0, 0, 1)
