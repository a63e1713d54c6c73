"""The files of a model folder are compared with each other before a run."""

import json

import pytest
import torch
from config_cases import EXPERTS, hf_shapes, write_model, write_weights
from safetensors.torch import save_file

from rlsys.model.folder_check import check_model_folder, folder_problems, model_notes
from rlsys.model.shape import read_model_shape
from rlsys.model.tokenizer_files import num_token_ids, token_ids
from rlsys.model.weight_files import weight_files
from rlsys.preflight.data import check_prompt_tokens
from rlsys.types import Prompt

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def problems(folder):
    return folder_problems(folder, read_model_shape(folder), has_prompts=True)


def only(found):
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"model_type": "llama"},
        {"model_type": "qwen2", "tie_word_embeddings": False},
        EXPERTS,
    ],
)
def test_a_whole_folder_has_no_problems(tmp_path, sizes):
    assert problems(write_model(tmp_path, **sizes)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("model.norm.weight"), ["lacks model.norm.weight", "different models"]),
        (
            lambda w: [w.pop(name) for name in list(w) if ".layers.3." in name],
            ["lacks model.layers.3.", "more: "],
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": (256,)}),
            ["holds model.layers.0.self_attn.q_proj.bias", "does not have"],
        ),
        (
            lambda w: w.update({EMBEDDING: (400, 64)}),
            [EMBEDDING, "[400, 64]", "[384, 64]", "resized vocabulary"],
        ),
        (
            lambda w: w.update({"model.layers.1.mlp.down_proj.weight": (64, 96)}),
            ["model.layers.1.mlp.down_proj.weight", "[64, 96]", "[64, 128]"],
        ),
    ],
)
def test_weights_that_do_not_fit_config_json(tmp_path, change, words):
    folder = write_model(tmp_path)
    shapes = hf_shapes(folder)
    change(shapes)
    write_weights(folder / "model.safetensors", shapes)
    text = only(problems(folder))
    for word in [str(tmp_path), *words]:
        assert word in text


def test_names_of_a_base_class_say_how_to_save_the_model(tmp_path):
    folder = write_model(tmp_path)
    shapes = {name.removeprefix("model."): shape for name, shape in hf_shapes(folder).items()}
    write_weights(folder / "model.safetensors", shapes)
    missing, unknown = problems(folder)
    assert "ForCausalLM" in missing
    assert "holds embed_tokens.weight" in unknown


def test_a_head_that_is_missing_asks_for_tied_embeddings(tmp_path):
    folder = write_model(tmp_path, tie_word_embeddings=False)
    shapes = hf_shapes(folder)
    del shapes[HEAD]
    write_weights(folder / "model.safetensors", shapes)
    assert "set tie_word_embeddings to true" in only(problems(folder))


@pytest.mark.parametrize(("dtype", "fits"), [("BF16", True), ("F16", True), ("F8_E4M3", False)])
def test_weights_in_types_that_are_not_trained(tmp_path, dtype, fits):
    folder = write_model(tmp_path)
    write_weights(folder / "model.safetensors", hf_shapes(folder), dtype)
    found = problems(folder)
    assert (found == []) == fits
    assert fits or "stored as F8_E4M3" in found[0]


@pytest.mark.parametrize(
    ("change", "fits"),
    [(lambda head: head, True), (lambda head: head + 1e-3, False), (lambda h: h.half(), False)],
)
def test_the_head_of_a_tied_model_is_its_embedding(tmp_path, change, fits):
    folder = write_model(tmp_path)
    tensors = {name: torch.randn(shape) for name, shape in hf_shapes(folder).items()}
    head = change(tensors[EMBEDDING].clone())
    save_file(tensors, folder / "model-1.safetensors")
    save_file({HEAD: head}, folder / "model-2.safetensors")
    (folder / "model.safetensors").unlink()
    found = problems(folder)
    assert (found == []) == fits
    if not fits:
        for word in (str(folder / "model-2.safetensors"), HEAD, "tie_word_embeddings", "false"):
            assert word in only(found)


def test_only_files_of_the_index_are_the_model(tmp_path):
    """transformers reads no others; an optimizer's state or an adapter may lie beside them."""
    folder = write_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(hf_shapes(folder), "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_weights(folder / "adapter_model.safetensors", {"lora_A.weight": (4, 4)})
    assert weight_files(folder) == [folder / "model-1.safetensors"]
    assert problems(folder) == []
    write_weights(folder / "model.safetensors", hf_shapes(folder))
    assert "two sets of weights" in only(problems(folder))


def write_tokenizer(folder, added, template="{{ messages }}"):
    vocab = {f"w{i}": i for i in range(380)}
    entries = [{"content": token, "id": token_id} for token, token_id in added.items()]
    tokenizer = {"model": {"vocab": vocab}, "added_tokens": entries}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(template)


def test_a_token_of_the_template_without_an_embedding(tmp_path):
    folder = write_model(tmp_path)
    write_tokenizer(folder, {"<|turn|>": 384, "<|unused|>": 385}, "<|turn|>{{ messages }}")
    text = only(problems(folder))
    for word in ("'<|turn|>'", "id 384", "384 tokens", "resize_token_embeddings(386)"):
        assert word in text


@pytest.mark.parametrize("eos_token", ["<|turn|>", {"content": "<|turn|>", "lstrip": False}])
def test_an_end_of_sequence_token_without_an_embedding(tmp_path, eos_token):
    folder = write_model(tmp_path)
    write_tokenizer(folder, {"<|turn|>": 384}, "{{ messages }}")
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | {"eos_token": eos_token}))
    assert "its eos_token is '<|turn|>' of id 384" in only(problems(folder))


@pytest.mark.parametrize("added", [{}, {"<|turn|>": 383}])
def test_tokens_that_the_model_has(tmp_path, added):
    folder = write_model(tmp_path)
    write_tokenizer(folder, added, "<|turn|>{{ messages }}")
    assert problems(folder) == []


@pytest.mark.parametrize("eos", [384, [2, 900], -1, "2"])
def test_an_end_of_sequence_that_the_model_does_not_have(tmp_path, eos):
    folder = write_model(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    text = only(problems(folder))
    assert "generation_config.json: eos_token_id" in text
    assert "384 tokens" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer.json", '{"model": ', "not valid JSON"),
        ("tokenizer.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", "not json", "not valid JSON"),
        ("generation_config.json", "{,}", "not valid JSON"),
        ("model.safetensors.index.json", "{}", "with weight_map"),
        ("model.safetensors", "", "not a safetensors file"),
        ("model.safetensors", "\0" * 4096, "not a safetensors file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    folder = write_model(tmp_path)
    (folder / name).write_text(content)
    text = only(problems(folder))
    assert str(folder / name) in text
    assert words in text


def test_a_problem_of_every_tensor_is_reported_once(tmp_path):
    folder = write_model(tmp_path)
    write_weights(folder / "model.safetensors", hf_shapes(folder), dtype="F8_E4M3")
    assert "stored as F8_E4M3" in only(problems(folder))
    shapes = {name: (*shape[:-1], shape[-1] + 2) for name, shape in hf_shapes(folder).items()}
    write_weights(folder / "model.safetensors", shapes)
    found = problems(folder)
    assert len(found) == 3
    assert f"{len(shapes) - 3} more are like it" in found[0]


def test_weights_of_something_else_beside_the_model(tmp_path):
    folder = write_model(tmp_path)
    write_weights(folder / "adapter_model.safetensors", {"layers.0.lora_A.weight": (8, 64)})
    text = only(problems(folder))
    assert "adapter_model.safetensors holds layers.0.lora_A.weight" in text
    assert "Move the file elsewhere" in text


def test_token_ids_are_those_of_transformers(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<pad>": 2}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path)
    assert token_ids(tmp_path) == tokenizer.get_vocab()
    assert num_token_ids(tmp_path) == 4


def test_token_ids_of_a_tokenizer_model_alone(tmp_path):
    """A vocabulary that is padded beyond them would be sampled from."""
    from sentencepiece import SentencePieceTrainer
    from transformers import LlamaTokenizer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["abc bcd cde dea"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=20,
        minloglevel=2,
    )
    assert num_token_ids(tmp_path) == 20
    assert token_ids(tmp_path) == LlamaTokenizer.from_pretrained(tmp_path).get_vocab()


def test_a_tokenizer_model_of_another_kind_says_nothing_about_ids(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert num_token_ids(tmp_path) is None


def test_ids_without_a_token_between_others_are_named(tmp_path):
    folder = write_model(tmp_path)
    assert model_notes(folder) == []
    vocabulary = {f"t{i}": i for i in range(300)}
    far = {"id": 310, "content": "<far>", "special": True}
    content = {"model": {"vocab": vocabulary}, "added_tokens": [far]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (note,) = model_notes(folder)
    assert "10 ids below 310 have no token" in note


def test_a_folder_without_a_tokenizer_file_says_nothing_about_ids(tmp_path):
    assert num_token_ids(tmp_path) is None


def test_a_folder_of_the_hub_is_checked_after_its_download(tmp_path):
    folder = write_model(tmp_path)
    shape = read_model_shape(folder)
    check_model_folder(folder, shape, has_prompts=True)
    write_weights(folder / "model.safetensors", {EMBEDDING: (384, 64)})
    with pytest.raises(ValueError, match="lacks model"):
        check_model_folder(folder, shape, has_prompts=False)


class Tokenizer:
    """The two methods that check_prompt_tokens calls."""

    def __len__(self):
        return 386

    def convert_ids_to_tokens(self, token_id):
        return {384: "<|turn|>"}[token_id]


def test_rows_with_a_token_without_an_embedding_are_named(tmp_path):
    folder = write_model(tmp_path)
    write_tokenizer(folder, {"<|turn|>": 384, "<|unused|>": 385})
    prompts = [Prompt(f"train:{i}", [], [1, 384 if i % 2 else 383]) for i in range(20)]
    check_prompt_tokens(folder, Tokenizer(), prompts[::2])
    with pytest.raises(ValueError, match=r"train:1, train:3") as error:
        check_prompt_tokens(folder, Tokenizer(), prompts)
    for word in ("and 5 more", "'<|turn|>' of id 384", "386 tokens", "384 (vocab_size"):
        assert word in str(error.value)
    assert "resize_token_embeddings(386)" in str(error.value)
