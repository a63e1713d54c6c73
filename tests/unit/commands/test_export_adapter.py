"""`rlsys export` of LoRA adapters, merged into their base or as PEFT folders; PEFT is the judge."""

import json

import pytest
import torch
from config_cases import write_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rlsys import cli
from rlsys.commands.merged_model import with_merged_adapter
from rlsys.run.model_source import find_model

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def base(tmp_path):
    """A random untied fp32 model with a tokenizer."""
    return save_base(tmp_path / "base")


def save_base(folder, *, tied=False, **sizes):
    write_model(folder, tie_word_embeddings=tied, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.float().save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(40)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="0").save_pretrained(folder)
    return folder


def write_adapter(base, folder, *, dtype=torch.float32, **options):
    """An adapter as PEFT saves it, whose B is not 0 as at its start."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"} | options
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def export(source, out, *options, to="hf"):
    return cli.main(["export", str(source), "--to", to, str(out), *map(str, options)])


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def of_peft(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter))


CASES = {
    "all linear": {},
    "rslora": {"use_rslora": True, "r": 9},
    "some": {"target_modules": ["q_proj", "down_proj"]},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}},
    "head and embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_merged_model_computes_what_peft_computes(base, tmp_path, options, capsys):
    adapter = write_adapter(base, tmp_path / "adapter", **options)
    assert export(adapter, tmp_path / "out", "--merge") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    expected = of_peft(base, adapter)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 0
    assert "adapter_config.json" not in {file.name for file in (tmp_path / "out").iterdir()}
    assert "in float32, rounded once to float32" in capsys.readouterr().out


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained_are_merged(tmp_path, bias):
    base = save_base(tmp_path / "base", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    adapter = write_adapter(base, tmp_path / "a", bias=bias, target_modules=["q_proj"])
    assert export(adapter, tmp_path / "out", "--merge") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), of_peft(base, adapter), atol=1e-5, rtol=0)


def test_the_sum_is_rounded_once(base, tmp_path):
    for file in base.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    adapter = write_adapter(base, tmp_path / "adapter")
    export(adapter, tmp_path / "out", "--merge")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    gaps = [(written[name].float() - exact[name]).abs() for name in written]
    steps = [torch.finfo(torch.bfloat16).eps * exact[name].abs() / 2 for name in written]
    assert all((gap <= step + 1e-7).all() for gap, step in zip(gaps, steps, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_report_compares_with_peft(base, tmp_path, dtype, capsys):
    adapter = write_adapter(base, tmp_path / "adapter")
    options = ["--merge", "--dtype", dtype, "--test_convert_precision", "--prompts", "2 + 3 = 5"]
    assert export(adapter, tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out
    assert "precision test passed" in printed
    assert ("rounding to bfloat16 explains" in printed) == (dtype == "bfloat16")


def test_without_merge_an_adapter_is_written_as_peft_folder(base, tmp_path, capsys):
    adapter = write_adapter(base, tmp_path / "adapter")
    assert export(adapter, tmp_path / "out") == 0
    assert torch.equal(of_peft(base, tmp_path / "out"), of_peft(base, adapter))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 0
    assert "LoRA adapter" in capsys.readouterr().out
    assert export(adapter, tmp_path / "half", "--dtype", "bfloat16") == 0
    tensors = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def change_config(adapter, **values):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def drop_a_factor(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, file)


BAD = {
    "DoRA": (lambda a: change_config(a, use_dora=True), ["DoRA", "merge it with PEFT"]),
    "init": (
        lambda a: change_config(a, init_lora_weights="pissa"),
        ["'pissa'", "changes the base"],
    ),
    "type": (lambda a: change_config(a, peft_type="IA3"), ["'IA3'", "LORA"]),
    "base": (
        lambda a: change_config(a, base_model_name_or_path="/not/there"),
        ["/not/there", "base_model_name_or_path", "adapter_config.json"],
    ),
    "weights": (lambda a: (a / "adapter_model.safetensors").unlink(), ["lacks adapter_model"]),
    "factor": (drop_a_factor, ["has both factors", "lora_A"]),
}


@pytest.mark.parametrize(("spoil", "parts"), BAD.values(), ids=BAD)
def test_an_adapter_that_cannot_be_merged_is_refused(base, tmp_path, spoil, parts, capsys):
    adapter = write_adapter(base, tmp_path / "adapter")
    spoil(adapter)
    assert export(adapter, tmp_path / "out", "--merge") == 2
    printed = capsys.readouterr().err
    assert all(part in printed for part in parts), printed
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(base, tmp_path, capsys):
    adapter = write_adapter(base, tmp_path / "adapter")
    other = save_base(tmp_path / "other", num_hidden_layers=1)
    change_config(adapter, base_model_name_or_path=str(other))
    assert export(adapter, tmp_path / "out", "--merge") == 2
    assert "does not have, such as model.layers.1" in capsys.readouterr().err


def test_a_change_of_one_of_two_tied_tensors_is_refused(tmp_path, capsys):
    tied = save_base(tmp_path / "tied", tied=True)
    adapter = write_adapter(tied, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    assert export(adapter, tmp_path / "out", "--merge") == 2
    assert "one tensor for embedding and output head" in capsys.readouterr().err


def test_options_that_an_adapter_or_a_model_does_not_have_are_refused(base, tmp_path, capsys):
    adapter = write_adapter(base, tmp_path / "adapter")
    assert export(base, tmp_path / "out", "--merge") == 2
    assert "--merge is for LoRA adapters" in capsys.readouterr().err
    assert export(adapter, tmp_path / "out", "--test_convert_precision", to="mcore") == 2
    assert "--to mcore, --test_convert_precision: for models" in capsys.readouterr().err
    assert export(adapter, tmp_path / "out", "--merge", to="mcore") == 2
    assert "merge first" in capsys.readouterr().err


def test_infer_and_eval_merge_once_for_each_state_of_an_adapter(
    base, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter = write_adapter(base, tmp_path / "adapter")
    source = with_merged_adapter(find_model(str(adapter)))
    merged = AutoModelForCausalLM.from_pretrained(source.folder)
    torch.testing.assert_close(logits(merged), of_peft(base, adapter), atol=1e-5, rtol=1e-5)
    assert (source.label, source.saved) == (str(adapter), adapter)
    assert f"merged {adapter} into {source.folder}" in capsys.readouterr().err
    assert with_merged_adapter(find_model(str(adapter))).folder == source.folder
    assert capsys.readouterr().err.count("merged") == 0
    change_config(adapter, lora_alpha=3)
    assert with_merged_adapter(find_model(str(adapter))).folder != source.folder
    model = find_model(str(base))
    assert with_merged_adapter(model) == model


def test_a_source_knows_its_adapter_and_its_base(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    source = find_model(str(adapter))
    assert (source.folder, source.saved) == (base, adapter)
    assert source.label == str(adapter)
    assert source.adapter.scaling("model.layers.0.mlp.up_proj") == 2.5
