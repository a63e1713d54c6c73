"""`rlsys export` to Hugging Face folders: what is written, and what is refused before that."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from config_cases import EXPERTS, hf_shapes, write_model, write_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from rlsys import cli
from rlsys.commands import export as command
from rlsys.commands.export import parse_size
from rlsys.model.shape import read_model_shape
from rlsys.run.model_source import find_model


@pytest.fixture
def model(tmp_path):
    """A folder of random weights, as a checkpoint of a run has it."""
    folder = write_model(tmp_path / "model")
    rng = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=rng) for n, s in hf_shapes(folder).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "optimizer").mkdir()
    (folder / "optimizer/__0_0.distcp").write_text("")
    (folder / "rollouts.json").write_text("{}")
    (folder / "training_args.bin").write_text("")
    return folder


def export(source, out, *options, to="hf"):
    return cli.main(["export", str(source), "--to", to, str(out), *map(str, options)])


def contents(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_weights_config_and_tokenizer_are_kept_and_nothing_of_the_run(model, tmp_path, capsys):
    (model / "generation_config.json").write_text('{"temperature": 0.7}')
    assert export(model, tmp_path / "out") == 0
    assert_equal(contents(tmp_path / "out"), contents(model))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    written, source = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", model)
    )
    assert written == source | {"dtype": "float32"}
    out = capsys.readouterr().out
    assert "qwen3" in out
    assert "parameters in float32" in out
    assert "wrote" in out


@pytest.mark.parametrize("size", ["20KB", "100KiB", "0.2MB"])
def test_shards_are_at_most_as_large_as_asked(model, tmp_path, size):
    export(model, tmp_path / "out", "--dtype", "bfloat16", "--max_shard_size", size)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        tensors = load_file(file)
        held = sum(tensor.nbytes for tensor in tensors.values())
        assert held <= parse_size(size) or len(tensors) == 1
    expected = {name: tensor.bfloat16() for name, tensor in contents(model).items()}
    assert_equal(contents(tmp_path / "out"), expected)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()


def test_auto_keeps_the_type_of_each_tensor(model, tmp_path):
    tensors = contents(model)
    norms = [name for name in tensors if "norm" in name]
    mixed = {n: tensor if n in norms else tensor.bfloat16() for n, tensor in tensors.items()}
    save_file(mixed, model / "model.safetensors")
    assert export(model, tmp_path / "out") == 0
    assert_equal(contents(tmp_path / "out"), mixed)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_a_number_that_float16_does_not_hold(model, tmp_path, capsys):
    tensors = contents(model)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, model / "model.safetensors")
    assert export(model, tmp_path / "out", "--dtype", "float16") == 2
    assert "model.norm.weight holds 100000, and float16 ends at 65,504" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_and_its_steps(model, tmp_path, capsys):
    run = tmp_path / "run"
    for step, factor in ((1, 1.0), (2, 2.0)):
        folder = run / f"checkpoints/step-{step}"
        shutil.copytree(model, folder)
        save_file(
            {n: factor * tensor for n, tensor in contents(model).items()},
            folder / "model.safetensors",
        )
    (run / "config.yaml").write_text("")
    assert export(run, tmp_path / "newest") == 0
    assert "step 2" in capsys.readouterr().out
    assert export(run, tmp_path / "first", "--step", 1) == 0
    assert_equal(contents(tmp_path / "first"), contents(model))
    assert_equal(contents(tmp_path / "newest"), contents(run / "checkpoints/step-2"))
    assert export(run, tmp_path / "other", "--step", 3) == 2
    assert "no checkpoint of step 3: it has 1, 2" in capsys.readouterr().err
    (run / "checkpoints/step-2").rename(run / "interrupted")
    os.utime(run / "interrupted/config.json")
    assert export(run, tmp_path / "interrupted") == 0
    assert_equal(contents(tmp_path / "interrupted"), contents(run / "interrupted"))


def test_hf_folders_that_a_run_writes_are_steps_of_it_too(model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model, run / "hf/step-3")
    (run / "config.yaml").write_text("")
    assert find_model(str(run)).folder == run / "hf/step-3"
    assert find_model(str(run), 3).step == 3
    shutil.copytree(model, run / "checkpoints/step-3")
    assert find_model(str(run), 3).folder == run / "checkpoints/step-3"


def test_experts_are_written_one_by_one(tmp_path):
    model = write_model(tmp_path / "model", **EXPERTS)
    assert export(model, tmp_path / "out", "--dtype", "bfloat16") == 0
    written = contents(tmp_path / "out")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == hf_shapes(model)


# --- one clear error each, before anything is written ---------------------------------------------


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_off(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)


def of_another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))


def another_shape(folder):
    tensors = contents(folder)
    tensors["model.norm.weight"] = torch.zeros(65)
    save_file(tensors, folder / "model.safetensors")


def missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(hf_shapes(folder), "model-00001-of-00002.safetensors")
    weight_map["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def with_tokens(number, last=None):
    def write(folder):
        vocabulary = {f"w{i}": i for i in range(number)}
        if last is not None:
            vocabulary[last] = number - 1
        tokenizer = json.dumps({"model": {"vocab": vocabulary}})
        (folder / "tokenizer.json").write_text(tokenizer)
        (folder / "chat_template.jinja").write_text("<|turn|>{{ messages }}")

    return write


def embeddings(number):
    def write(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": number}))
        write_weights(folder / "model.safetensors", hf_shapes(folder))
        with_tokens(380)(folder)

    return write


def quantised(method, end):
    def write(folder):
        names = {name.replace(".weight", end): (4, 4) for name in hf_shapes(folder)}
        write_weights(folder / "model.safetensors", names, "I32")
        if method:
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = {"quant_method": method}
            (folder / "config.json").write_text(json.dumps(config))

    return write


def adapter(folder):
    text = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    (folder / "adapter_config.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("config.json"), ["neither a model folder (it has no config.json)"]),
        (remove("model.safetensors"), ["no .safetensors file"]),
        (cut_off, ["model.safetensors is cut off", "download it again"]),
        (missing_shard, ["lacks model-00002-of-00002.safetensors", "names"]),
        (of_another_model, ["lacks model.layers.4.", "of different models"]),
        (another_shape, ["model.norm.weight has shape [65]", "it is [64]", "different models"]),
        (with_tokens(400, last="<|turn|>"), ["'<|turn|>' of id 399", "384 tokens", "resize"]),
        (embeddings(2048), ["embeddings for 2,048", "tokenizer 380 tokens", "more than padding"]),
        (quantised("gptq", ".qweight"), ["stored as gptq", "bfloat16 model that was quantized"]),
        (quantised("awq", ".qweight"), ["stored as awq", "bfloat16 model that was quantized"]),
        (quantised("fp8", ".weight_scale_inv"), ["FineGrainedFP8Config(dequantize=True)"]),
        (quantised(None, ".qweight"), ["stored as gptq or awq"]),
        (quantised(None, ".weight_scale_inv"), ["stored as fp8", "dequantize=True"]),
        (adapter, ["adapter_config.json lacks r, lora_alpha"]),
    ],
)
@pytest.mark.parametrize("to", ["hf", "mcore"])
def test_bad_sources_are_one_error_before_anything_is_written(
    model, tmp_path, capsys, change, words, to
):
    change(model)
    assert export(model, tmp_path / "out", to=to) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert error.count("\n  - ") <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_padding_and_tokens_that_nothing_uses_are_said(model, tmp_path, capsys):
    with_tokens(380)(model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert export(model, tmp_path / "padded") == 0
    assert (
        "4 of the 384 embeddings have no token: the vocabulary is padded" in capsys.readouterr().out
    )
    with_tokens(390)(model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert export(model, tmp_path / "unused") == 0
    assert "6 of the tokenizer's 390 tokens have no embedding" in capsys.readouterr().out


def test_an_output_folder_that_exists(model, tmp_path, capsys):
    assert export(model, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert export(model, tmp_path / "out") == 2
    assert (
        "exists: choose another folder, or replace it with --overwrite" in capsys.readouterr().err
    )
    assert export(model, tmp_path / "out", "--overwrite") == 0
    assert_equal(contents(tmp_path / "out"), contents(model))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_overwrite_deletes_model_folders_only(model, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("")
    assert export(model, tmp_path / "home", "--overwrite") == 2
    assert "not a model folder" in capsys.readouterr().err
    assert export(model, tmp_path / "home") == 2
    assert "replace it" not in capsys.readouterr().err  # --overwrite would be refused
    assert (tmp_path / "home/thesis.tex").exists()
    for out in (model, model / "below", tmp_path):
        assert export(model, out, "--overwrite") == 2
        assert "is the source, or one lies in the other" in capsys.readouterr().err
    assert (model / "model.safetensors").exists()


def test_a_full_disk_is_said_with_both_numbers(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "free_bytes", lambda place: 100 * 2**10)
    assert export(model, tmp_path / "out") == 2
    needed = 4 * read_model_shape(model).num_params / 2**20
    error = capsys.readouterr().err
    assert "0.1 MiB free" in error
    assert f"the model takes {needed:.1f} MiB" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("2GiB", 2**31), ("500MB", 5 * 10**8), ("1.5kib", 1536), ("10 KB", 10**4)],
)
def test_sizes_are_those_of_transformers(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0MB", "five GB", "nanGB", "infGB"])
def test_other_sizes_are_refused(model, tmp_path, capsys, text):
    assert export(model, tmp_path / "out", f"--max_shard_size={text}") == 2
    assert "is not a size such as 5GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("to", "words", "message"),
    [
        ("mcore", ["--max_shard_size", "1GB"], "--max_shard_size is for --to hf"),
        ("hf", ["--per_layer"], "are for --test_convert_precision: add it"),
        ("hf", ["--prompts", "a"], "are for --test_convert_precision: add it"),
    ],
)
def test_options_that_nothing_would_read_are_refused(model, tmp_path, capsys, to, words, message):
    assert export(model, tmp_path / "out", *words, to=to) == 2
    assert message in capsys.readouterr().err


# --- processes -----------------------------------------------------------------------------------

LARGE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
}
"""48 million parameters: 200 MB."""
SHARD_BYTES = 5_000_000
"""The processes below write shards of 5MB."""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "rlsys.cli", "export", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.processes
@pytest.mark.parametrize("replaces", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_kill_leaves_nothing_half_written(tmp_path, replaces):
    source, out = write_model(tmp_path / "model", **LARGE), tmp_path / "place/out"
    before = {}
    if replaces:
        write_model(out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
    words = (source, "--to", "hf", out, "--overwrite", "--max_shard_size", "5MB")
    process = start(*words)
    partial = tmp_path / "place/out.partial"
    while not any(partial.glob("shard-*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was finished before the kill"
    assert any(partial.glob("shard-*"))
    assert out.exists() == replaces
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before
    again = start(*words)
    assert again.wait() == 0
    assert {n: tuple(t.shape) for n, t in contents(out).items()} == hf_shapes(source)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


WATCHED = """
import sys, threading, time
from rlsys import cli

small, small_out, *words = sys.argv[1:]
cli.main(["export", small, "--to", "hf", small_out, *words[4:]])  # now all code is loaded

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

start, peak, ended = anonymous(), [0], threading.Event()
def watch():
    while not ended.wait(0.001):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
code = cli.main(["export", *words])
ended.set()
thread.join()
heavy = {"ray", "vllm", "megatron", "transformers"} & {name.split(".")[0] for name in sys.modules}
print("RESULT", code, peak[0] - start, sorted(heavy))
"""


@pytest.mark.processes
@pytest.mark.parametrize("dtype", [pytest.param("auto", marks=pytest.mark.slow), "bfloat16"])
def test_memory_is_that_of_one_shard_and_nothing_heavy_is_imported(tmp_path, dtype):
    """Pages of the source's files are not counted: the system takes them back when it needs to."""
    source = write_model(tmp_path / "model", **LARGE)
    small = [write_model(tmp_path / "small"), tmp_path / "small-out"]
    options = [source, "--to", "hf", tmp_path / "out", "--max_shard_size", "5MB", "--dtype", dtype]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, small + options)],
        capture_output=True,
        text=True,
        check=True,
    )
    result = done.stdout.rpartition("RESULT ")[2].strip()
    code, taken, heavy = result.split(" ", 2)
    assert code == "0"
    assert heavy == "[]"
    assert 0 < int(taken) < 5 * SHARD_BYTES, result
    assert sum(tensor.nbytes for tensor in contents(tmp_path / "out").values()) > 15 * SHARD_BYTES


# --- precision -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A model whose logits mean something, with a tokenizer that transformers loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("real") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("dtype", "rounds"), [("auto", False), ("bfloat16", True)])
def test_what_is_written_computes_the_same(real, tmp_path, capsys, dtype, rounds):
    options = ("--dtype", dtype, "--test_convert_precision", "true", "--per_layer")
    assert export(real, tmp_path / "out", *options) == 0
    out = capsys.readouterr().out
    assert "precision test passed" in out
    assert ("rounding to bfloat16 explains" in out) == rounds
    for place in ("embedding", "layer 0", "layer 1", "final norm", "logits"):
        assert place in out


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_that_are_wrong_by_little_fail_the_test(real, tmp_path, capsys, monkeypatch, dtype):
    """A tenth of one norm: rounding to bfloat16 changes every weight, and does not excuse it."""
    write = command.write_hf

    def write_wrongly(plan):
        write(plan)
        tensors = load_file(plan.out / "model.safetensors")
        tensors["model.layers.1.post_attention_layernorm.weight"] *= 1.1
        save_file(tensors, plan.out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(command, "write_hf", write_wrongly)
    options = ("--dtype", dtype, "--test_convert_precision", "--prompts", "one two three")
    assert export(real, tmp_path / "out", *options) == 1
    assert "precision test FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "", "it holds no prompt"),
        ("p.jsonl", '{"text": "a"}', "line 1 is not a JSON object with prompt or messages"),
        ("none.txt", None, "the file does not exist"),
    ],
)
def test_prompts_are_read_before_anything_is_written(real, tmp_path, capsys, name, text, words):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    options = ("--test_convert_precision", "--prompts", file)
    assert export(real, tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_file(real, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "ab"}\n{"prompt": "abcd"}\n')
    assert export(real, tmp_path / "out", "--test_convert_precision", "--prompts", file) == 0
    assert "on 6 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["hf", "mcore"])
def test_a_model_of_mcore_bridge_is_refused_by_its_type(model, tmp_path, capsys, to):
    values = json.loads((model / "config.json").read_text()) | {"model_type": "glm4"}
    (model / "config.json").write_text(json.dumps(values))
    assert export(model, tmp_path / "out", to=to) == 2
    error = capsys.readouterr().err
    assert "this is a 'glm4'. If mcore-bridge trained it" in error
    assert not (tmp_path / "out").exists()
