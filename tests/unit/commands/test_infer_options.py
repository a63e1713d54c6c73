"""Options of `rlsys infer` that a mode does not read are refused, before anything is loaded."""

import json

import pytest
from config_cases import write_model

from rlsys import cli
from rlsys.commands.infer import prompt_settings
from rlsys.engines.vllm.serving import (
    CPU_CONTEXT_TOKENS,
    EngineOptions,
    serve_command,
    serving_arguments,
)
from rlsys.model.memory import kv_block_tokens
from rlsys.model.shape import read_model_shape
from rlsys.run.folder import RunDir
from rlsys.run.model_source import ModelSource


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--serve --prompts a --out b", "--serve and --prompts are two different things"),
        ("--prompts a", "--prompts FILE and --out FILE belong together"),
        ("--out a", "--prompts FILE and --out FILE belong together"),
        ("--port 80", "--port: only --serve reads this"),
        ("--vllm_args --x", "--vllm_args: only --serve reads this"),
        ("--serve --temperature 0 --system x", "--temperature, --system: clients of --serve"),
        ("--temperature -1", "--temperature -1 should be at least 0"),
        ("--top_p 0", "--top_p 0 should be above 0 and at most 1"),
        ("--max_model_len 0", "--max_model_len 0 should be at least 1"),
        ("--max_tokens 0", "--max_tokens 0 should be at least 1"),
        # Before the model, and before a hub is asked.
        ("--prompts nofile --out b", "--prompts nofile: there is no such file"),
        ("--prompts a/b.jsonl#5 --out b", "--prompts a/b.jsonl#5: there is no such file"),
        ("", "there is no folder ./nowhere on this machine"),
    ],
)
def test_what_is_refused(words, message, capsys):
    assert cli.main(["infer", "./nowhere", *words.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    def folder(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return folder


@pytest.mark.parametrize(
    ("config", "asked", "length"),
    [
        ({"max_position_embeddings": 512}, None, 512),
        ({"max_position_embeddings": 2**17}, None, CPU_CONTEXT_TOKENS),
        ({"max_position_embeddings": 2**17}, 2**15, 2**15),
        ({"text_config": {"max_position_embeddings": 1024}}, None, 1024),
        ({}, None, CPU_CONTEXT_TOKENS),
    ],
)
def test_the_context_on_cpu(folder, config, asked, length):
    arguments = serving_arguments(folder(**config), EngineOptions("cpu", max_model_len=asked))
    assert arguments["max_model_len"] == length
    assert arguments["max_num_batched_tokens"] >= length


def test_more_than_the_model_reads_is_refused(folder):
    options = EngineOptions("cpu", max_model_len=600)
    with pytest.raises(ValueError, match=r"--max_model_len 600: .* has 512 positions"):
        serving_arguments(folder(max_position_embeddings=512), options)


def test_on_cpu_a_block_of_the_cache_is_that_of_rollout_engines(tmp_path):
    """Of linear layers it holds a state, of latent attention vLLM has one size."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    for name, values in {"plain": {}, "hybrid": {"model_type": "qwen3_5_text"} | linear}.items():
        folder = write_model(tmp_path / name, **values)
        arguments = serving_arguments(folder, EngineOptions("cpu"))
        assert arguments["block_size"] == kv_block_tokens(read_model_shape(folder), "cpu")
        assert arguments.get("enable_prefix_caching") == (False if values else None)
    assert arguments["block_size"] > 128


def test_on_gpus_the_context_is_what_fits(folder):
    arguments = serving_arguments(folder(max_position_embeddings=512), EngineOptions("cuda"))
    assert arguments["max_model_len"] == -1
    assert "enforce_eager" not in arguments


def test_the_command_of_the_server(folder):
    command = serve_command(
        folder(),
        EngineOptions("cpu"),
        names=["a", "b"],
        host="127.0.0.1",
        port=1,
        more=["--api-key", "k"],
    )
    text = " ".join(command)
    assert "--served-model-name a b --" in text
    assert "--allowed-origins [] " in text
    assert "--enforce-eager" in command
    assert "--no-enable-chunked-prefill" in command
    assert command[-2:] == ["--api-key", "k"]


def test_a_run_is_asked_as_it_was_trained(tmp_path, capsys):
    data = {"system": "Think.", "chat_template_kwargs": {"enable_thinking": False}}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data}))
    source = ModelSource(str(tmp_path), tmp_path / "final", RunDir(tmp_path))
    assert prompt_settings(source, None) == ("Think.", {"enable_thinking": False})
    assert "note: as in the run, data.system: Think." in capsys.readouterr().err
    assert prompt_settings(source, "Be brief.")[0] == "Be brief."
    assert prompt_settings(source, "")[0] is None
    assert prompt_settings(ModelSource("m", tmp_path), None) == (None, {})
