"""Models that are missing, incomplete, or do not fit the parallel sizes of the config."""

import json

import pytest
from config_cases import EXPERTS, write_model
from preflight_cases import only

from rlsys.config import PolicyConfig
from rlsys.model.shape import read_model_shape
from rlsys.preflight.model import recompute_note


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_a_missing_model_folder(problems, path):
    found = problems(model={"path": path})
    assert f"there is no model folder {path!r}" in only(found)
    assert found[0].only_here


def test_a_missing_reward_model(problems):
    text = only(problems(reward={"reward_model": ["./nowhere"]}))
    assert text == "reward.reward_model: there is no model folder './nowhere' on this machine"


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "words"),
    [
        ("cpu", "auto", None, "needs GPUs that multiply in FP8, and this run is on the CPU"),
        ("cuda", "float32", (9, 0), "model.dtype is float32: set model.dtype to bfloat16"),
        ("cuda", "auto", (8, 0), "compute capability 8.0 do not multiply in FP8, which begins"),
        ("cuda", "auto", (8, 9), None),
        ("cuda", "bfloat16", None, None),
    ],
)
def test_engines_quantise_on_gpus_that_multiply_in_fp8(
    problems, tmp_path, monkeypatch, device, dtype, capability, words
):
    monkeypatch.setattr("rlsys.preflight.model.gpu_compute_capability", lambda: capability)
    found = problems(
        rollout={"generation_batch_size": 16, "quantization": "fp8"},
        model={"path": str(write_model(tmp_path / "quantised")), "dtype": dtype},
        device=device,
    )
    own = [str(problem) for problem in found if "rollout.quantization = fp8" in str(problem)]
    assert len(own) == (words is not None)
    assert words is None or words in own[0]


def test_drafts_are_for_gpus(problems):
    def found(device):
        drafts = {"method": "ngram", "num_speculative_tokens": 2}
        rollout = {"generation_batch_size": 16, "speculative_config": drafts}
        problems_here = problems(rollout=rollout, device=device)
        return [str(one) for one in problems_here if "speculative_config" in str(one)]

    (text,) = found("cpu")
    assert "completions and log-probs would be wrong" in text
    assert found("cuda") == []


def test_a_draft_model_is_here_and_has_the_vocabulary_of_the_policy(problems, tmp_path):
    def found(path):
        drafts = {"model": str(path), "num_speculative_tokens": 2}
        rollout = {"generation_batch_size": 16, "speculative_config": drafts}
        found = problems(rollout=rollout, device="cuda")
        return [one for one in found if "speculative_config: " in str(one)]

    assert "there is no model folder './nowhere'" in only(found("./nowhere"))
    write_model(tmp_path / "other", vocab_size=768)
    text = only(found(tmp_path / "other"))
    assert "has a vocabulary of 768 tokens and model.path one of 384" in text
    write_model(tmp_path / "small", num_hidden_layers=1)
    assert found(tmp_path / "small") == []


def test_a_model_that_may_be_a_folder_or_a_hub_id_says_both(problems, offline):
    text = only(problems(model={"path": "somebody/some-model"}))
    assert "neither a folder on this machine nor a hub model" in text


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama", "qwen3"]),
        ({"model_type": "gemma2"}, ["gemma2", "attn_logit_softcapping", "qwen3"]),
        ({"model_type": None}, ["not supported"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'"]),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            ["layer_types", "sliding_attention", "gives no window"],
        ),
        ({"layer_types": ["full_attention", None, "x"]}, ["'x', None in layer_types"]),
        ({"layer_types": 5}, ["5 in layer_types"]),
        (
            {"max_position_embeddings": 100},
            ["64 + ", "= 128 tokens", "100", "make that 100 or fewer"],
        ),
        ({"head_dim": 16}, ["16 dimensions", "vLLM on CPU"]),
        (EXPERTS | {"decoder_sparse_step": 9}, ["decoder_sparse_step = 9", "no layer has experts"]),
        (EXPERTS | {"mlp_only_layers": [7]}, ["mlp_only_layers = [7]", "from 0 to 3"]),
        (EXPERTS | {"num_experts_per_tok": 9}, ["num_experts_per_tok = 9", "8 experts"]),
        (EXPERTS | {"num_experts_per_tok": 1}, ["norm_topk_prob", "num_experts_per_tok = 1"]),
        ({"model_type": "qwen3_moe"}, ["lacks 'num_experts'"]),
    ],
)
def test_a_model_that_cannot_be_used(problems, tmp_path, sizes, words):
    write_model(tmp_path / "other", **sizes)
    text = only(problems(model={"path": str(tmp_path / "other")}, device="cpu"))
    for word in words:
        assert word in text


def test_layouts_that_do_not_fit_layers_with_and_without_experts(problems, tmp_path):
    shared = {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 100}
    write_model(tmp_path / "mixed", **EXPERTS | shared | {"mlp_only_layers": [0, 1]})
    model = {"path": str(tmp_path / "mixed")}
    found = problems("--rollout.tensor_parallel_size", "8", model=model)
    assert "experts' intermediate size 32" not in only(found)
    assert "shared expert's intermediate size 100: use 1 or 2 or 4" in only(found)
    policy = ["--policy.world_size", "8", "--policy.expert_model_parallel_size", "8"]
    found = problems("--policy.tensor_parallel_size", "8", *policy, model=model)
    assert "KV heads 4, shared expert's intermediate size 100: use 1 or 2 or 4" in only(found)
    assert problems("--policy.pipeline_parallel_size", "1", model=model) == []
    found = problems(
        "--policy.pipeline_parallel_size", "2", "--policy.world_size", "2", model=model
    )
    assert "a pipeline rank with layers 0, 1, none of which has experts" in only(found)


BRIDGED = {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"]}


@pytest.mark.parametrize(
    ("sizes", "sections", "words"),
    [
        (BRIDGED, {"device": "cpu"}, ["'glm4' is not supported", "On GPUs mcore-bridge"]),
        (
            BRIDGED,
            {"device": "cuda", "model": {"bridge": "rlsys"}},
            ["'glm4' is not supported"],
        ),
        (BRIDGED, {"device": "cuda"}, ["'glm4' is left to mcore-bridge", "pip install"]),
        (
            BRIDGED | {"architectures": ["Glm4vForConditionalGeneration"]},
            {"device": "cuda"},
            ["Glm4vForConditionalGeneration", "models of text"],
        ),
        (BRIDGED | {"architectures": None}, {"device": "cuda"}, ["architectures = None"]),
        (
            {},
            {"device": "cpu", "model": {"bridge": "mcore_bridge"}},
            ["model.bridge = mcore_bridge needs GPUs"],
        ),
    ],
    ids=str,
)
def test_a_model_that_is_left_to_mcore_bridge(problems, tmp_path, sizes, sections, words):
    folder = write_model(tmp_path / "other", **sizes)
    model = {"path": str(folder)} | sections.get("model", {})
    found = problems(**sections | {"model": model})
    texts = [problem.text for problem in found if "model" in problem.text]
    assert any(all(word in text for word in words) for text in texts), texts


def test_the_estimate_of_a_bridged_model_counts_its_experts(tmp_path):
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96}
    config = BRIDGED | experts | {"first_k_dense_replace": 1}
    shape = read_model_shape(write_model(tmp_path, **config), may_bridge=True)
    assert [layer.has_experts for layer in shape.layers] == [False, True, True, True]
    assert shape.experts.per_token == 2
    _, of_experts = shape.layer_params(shape.layers)
    assert of_experts == 3 * 8 * 3 * shape.hidden_size * 96


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["--policy.expert_model_parallel_size", "16", "--policy.world_size", "16"],
            ["expert_model_parallel_size = 16", "8 experts", "use 1 or 2 or 4 or 8"],
        ),
        (
            ["--policy.tensor_parallel_size", "2", "--policy.world_size", "2"],
            ["tensor_parallel_size = 2", "set policy.expert_model_parallel_size to 2"],
        ),
        (["--rollout.tensor_parallel_size", "64"], ["attention heads 8", "size 32", "4 or 8"]),
    ],
)
def test_layouts_that_do_not_fit_a_mixture_of_experts(problems, tmp_path, overrides, words):
    # What transformers 5 writes instead of num_experts; no rank has a dense layer's intermediate.
    sizes = EXPERTS | {"num_local_experts": 8, "intermediate_size": 127, "num_key_value_heads": 8}
    del sizes["num_experts"]
    write_model(tmp_path / "experts", **sizes)
    model = {"path": str(tmp_path / "experts")}
    assert problems(model=model) == []
    text = only(problems(*overrides, model=model))
    for word in words:
        assert word in text


def test_a_config_json_that_is_not_json(problems, tmp_path):
    (write_model(tmp_path / "other") / "config.json").write_text("{")
    assert "not valid JSON" in only(problems(model={"path": str(tmp_path / "other")}))


def test_a_config_json_that_lacks_a_size(problems, tmp_path):
    file = write_model(tmp_path / "other") / "config.json"
    sizes = json.loads(file.read_text())
    del sizes["hidden_size"]
    file.write_text(json.dumps(sizes))
    assert "lacks 'hidden_size'" in only(problems(model={"path": str(tmp_path / "other")}))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_a_model_folder_that_is_not_whole(problems, tmp_path, file, words):
    (write_model(tmp_path / "other") / file).unlink()
    assert words in only(problems(model={"path": str(tmp_path / "other")}))


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def safetensors(header, num_bytes):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 7\n", "git lfs pull"),
        (
            safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 7),
            "is cut off",
        ),
        (safetensors({"a": {"data_offsets": [0, 8]}}, 0)[:-20], "is cut off"),
        (b"PK\x03\x04 something else", "is not a safetensors file"),
    ],
)
def test_weights_that_did_not_arrive_whole(problems, tmp_path, content, words):
    folder = write_model(tmp_path / "other")
    (folder / "model.safetensors").write_bytes(content)
    found = problems(model={"path": str(folder)})
    assert words in only(found)
    assert "model.safetensors" in only(found)
    assert found[0].only_here


def test_missing_shards_are_a_problem_and_whole_weights_are_not(problems, tmp_path):
    folder = write_model(tmp_path / "other")
    assert problems(model={"path": str(folder)}) == []
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors" in only(problems(model={"path": str(folder)}))


@pytest.mark.parametrize(("tp", "fits"), [(2, True), (4, True), (6, False)])
def test_engines_whose_tensor_parallel_size_does_not_fit_the_kv_heads(problems, tmp_path, tp, fits):
    """12 heads on 4 KV heads: vLLM shares out either KV heads or copies of them."""
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 384}
    folder = write_model(tmp_path / "other", **sizes)
    options = ("--model.path", str(folder), "--rollout.tensor_parallel_size", str(tp))
    found = problems("--device", "cuda", *options)
    assert fits or "neither divides the model's 4 KV heads nor" in only(found)
    assert bool(found) != fits


@pytest.mark.parametrize(
    ("device", "prompt", "tp", "least"),
    [
        # A token takes 4 KiB in fp32: 2 x 4 layers x 4 KV heads x 32. One block is vLLM's own.
        ("cpu", 64, 1, 1),  # 2 blocks of 128 tokens are 1 MiB
        ("cpu", 65, 1, 2),
        # 2 KiB in bf16: 33 blocks of 16 tokens are 1 MiB and a block.
        ("cuda", 448, 1, 2),
        ("cuda", 432, 1, 1),
        # The KV heads are shared among ranks, down to one each: 65 blocks, and 129.
        ("cuda", 960, 2, 2),
        ("cuda", 944, 2, 1),
        ("cuda", 1984, 4, 2),
        ("cuda", 1968, 4, 1),
        ("cuda", 1984, 8, 2),
        ("cuda", 1968, 8, 1),
    ],
)
def test_a_kv_cache_that_holds_not_even_one_sequence(problems, tmp_path, device, prompt, tp, least):
    folder = write_model(tmp_path / "other", max_position_embeddings=4096)
    sections = {
        "device": device,
        "model": {"path": str(folder)},
        "data": {"max_prompt_length": prompt},
    }

    def found(size):
        rollout = {"kv_cache_memory_mb": size, "tensor_parallel_size": tp}
        return problems(**sections, rollout=rollout)

    assert found(least) == []
    if least > 1:
        text = only(found(least - 1))
        assert f"rollout.kv_cache_memory_mb = {least - 1} does not hold one sequence" in text
        assert f"{prompt} + rollout.max_completion_length 64 = {prompt + 64} tokens" in text
        assert f"set it to at least {least}, or leave it out" in text


def test_a_kv_cache_of_a_cluster_that_may_have_gpus(problems, tmp_path, gpus, monkeypatch):
    """There a token takes half as much."""
    gpus(0)
    monkeypatch.setattr("rlsys.preflight.devices.visible_gpus", lambda: 0)
    options = ["--rollout.kv_cache_memory_mb", "1", "--data.max_prompt_length", "65"]
    assert "at least 2" in only(problems(*options))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert problems(*options) == []


def test_a_chat_template_may_be_in_the_tokenizer_config(problems, tmp_path):
    folder = write_model(tmp_path / "other")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert problems(model={"path": str(folder)}) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # 8 heads, 4 KV heads, 4 layers, FFN 128, vocabulary 384.
        (
            ["--policy.tensor_parallel_size", "8", "--policy.world_size", "8"],
            ["policy.tensor_parallel_size = 8", "KV heads 4", "use 1 or 2 or 4"],
        ),
        (
            ["--policy.tensor_parallel_size", "3", "--policy.world_size", "3"],
            ["attention heads 8", "KV heads 4", "intermediate size 128"],
        ),
        (
            ["--policy.pipeline_parallel_size", "3", "--policy.world_size", "3"],
            ["pipeline_parallel_size = 3", "4 layers", "use 1 or 2 or 4"],
        ),
        (
            ["--policy.expert_model_parallel_size", "2", "--policy.world_size", "2"],
            ["expert_model_parallel_size = 2", "no experts", "leave it out"],
        ),
        (
            ["--rollout.tensor_parallel_size", "16"],
            ["rollout.tensor_parallel_size = 16", "attention heads 8"],
        ),
        (
            [
                "--grpo.beta",
                "0.1",
                "--reference.tensor_parallel_size",
                "8",
                "--reference.world_size",
                "8",
                "--reference.placement",
                "own",
            ],
            ["reference.tensor_parallel_size = 8", "KV heads 4"],
        ),
    ],
)
def test_parallel_sizes_that_do_not_divide_the_model(problems, overrides, words):
    text = only(problems(*overrides))
    for word in words:
        assert word in text


def test_large_heads_under_attention_with_wrong_gradients(problems, tmp_path, gpus):
    gpus(4)
    large = str(write_model(tmp_path / "large", head_dim=256))
    usual = str(write_model(tmp_path / "usual", head_dim=128))
    fused = ["--device", "cuda", "--policy.attention_backend", "fused"]
    text = only(problems("--model.path", large, *fused))
    assert "gradients are wrong for heads of more than 128 numbers" in text
    assert "heads of 256: set it to auto" in text
    assert problems("--model.path", usual, *fused) == []
    assert problems("--model.path", large, "--device", "cuda") == []


def test_sliding_windows_under_context_parallelism_on_gpus(problems, tmp_path, gpus):
    gpus(4)
    folder = str(write_model(tmp_path / "window", model_type="mistral", sliding_window=64))
    sizes = ["--policy.context_parallel_size", "2", "--policy.world_size", "2"]
    text = only(problems("--model.path", folder, "--device", "cuda", *sizes))
    assert "context_parallel_size = 2 with the sliding windows of mistral" in text
    assert problems("--model.path", folder, "--device", "cpu", *sizes) == []
    assert problems("--device", "cuda", *sizes) == []


def test_a_vocabulary_that_tensor_parallel_ranks_do_not_divide(problems, tmp_path):
    folder = str(write_model(tmp_path / "odd", vocab_size=385))
    sizes = ["--policy.tensor_parallel_size", "2", "--policy.world_size", "2"]
    assert problems("--model.path", folder, *sizes) == []


def test_a_reference_with_another_vocabulary(problems, tmp_path):
    folder = str(write_model(tmp_path / "other", vocab_size=512))
    text = only(problems("--grpo.beta", "0.1", "--reference.path", folder))
    assert "512" in text
    assert "384" in text
    assert problems("--reference.path", folder) == []  # beta is 0: no reference model


def test_a_reference_with_another_tokenizer_of_the_same_size(problems, tmp_path):
    def folder(name, **vocabulary):
        path = write_model(tmp_path / name)
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        return str(path)

    words = ["--grpo.beta", "0.1", "--model.path", folder("own", a=0, b=1, c=2, d=3)]
    text = only(problems(*words, "--reference.path", folder("other", a=0, b=2, c=1)))
    assert "has another tokenizer than model.path" in text
    assert "2 tokens of both differ ('b' is 2 for the reference and 1 for the policy)" in text
    assert problems(*words, "--reference.path", folder("fewer", a=0, b=1)) == []


@pytest.mark.parametrize(("modules", "does"), [(["mlp"], True), (["mlp", "core_attn"], False)])
def test_core_attn_does_nothing_in_layers_of_linear_attention(tmp_path, modules, does):
    policy = PolicyConfig(recompute="selective", recompute_modules=modules)
    note = recompute_note(
        policy, read_model_shape(write_model(tmp_path, model_type="qwen3_5_text"))
    )
    assert (note is None) == does
    assert does or "nothing in the 3 of 4 layers" in note
    assert recompute_note(policy, read_model_shape(write_model(tmp_path))) is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_adapter_that_vllm_cannot_sample_with_is_refused_with_the_remedy(
    problems, tmp_path, device
):
    write_model(tmp_path / "moe", **EXPERTS)
    sections = {"policy": {"lora": {}}, "model": {"path": str(tmp_path / "moe")}, "device": device}
    text = only(problems(weight_sync={"lora": "adapter"}, **sections))
    assert text.startswith("weight_sync.lora = adapter, but vLLM runs a model with experts")
    assert text.endswith("set weight_sync.lora to merged")
    assert problems(weight_sync={"lora": "merged"}, **sections) == []
    assert problems(**sections) == []
