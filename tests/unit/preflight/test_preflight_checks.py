"""What would fail a run later is told before it starts, with a remedy."""

import json
import os
import sys

import pytest
from config_cases import EXPERTS, write_model, write_run

from rlsys.config.load import load_config, save_config
from rlsys.data.reward_columns import column_use
from rlsys.preflight.checks import check_run
from rlsys.rewards import OWN_COLUMNS, orms
from rlsys.rewards.scoring import call_arguments
from rlsys.run.folder import ENDED, RunDir


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many this machine shows; many, unless a test says otherwise."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def show(number):
        monkeypatch.setattr("rlsys.preflight.machine.visible_gpus", lambda: number)

    monkeypatch.setattr("rlsys.preflight.machine.device_of_packages", lambda: None)
    show(64)
    return show


@pytest.fixture
def problems(tmp_path, gpus):
    def run(*overrides, **sections):
        return check_run(load_config(write_run(tmp_path, **sections), overrides).config)

    return run


def only(found):
    assert len(found) == 1, found
    return found[0].text


def test_a_run_that_has_everything_has_no_problems(problems):
    assert problems() == []


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_a_missing_model_folder(problems, path):
    found = problems(model={"path": path})
    assert f"there is no model folder {path!r}" in only(found)
    assert found[0].only_here


def test_a_missing_reward_model(problems):
    text = only(problems(reward={"reward_model": ["./nowhere"]}))
    assert text == "reward.reward_model: there is no model folder './nowhere' on this machine"


def test_a_model_that_may_be_a_folder_or_a_hub_id_says_both(problems, offline):
    text = only(problems(model={"path": "somebody/some-model"}))
    assert "neither a folder on this machine nor a hub model" in text


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama, qwen2, qwen3"]),
        ({"model_type": None}, ["not supported"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'"]),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            ["layer_types", "sliding_attention"],
        ),
        ({"layer_types": ["full_attention", None, "x"]}, ["'x', None in layer_types"]),
        ({"layer_types": 5}, ["5 in layer_types"]),
        ({"max_position_embeddings": 100}, ["64 + ", "= 128 tokens", "100", "lower one by 28"]),
        ({"head_dim": 16}, ["16 dimensions", "vLLM on CPU"]),
        (EXPERTS | {"decoder_sparse_step": 2}, ["decoder_sparse_step = 2"]),
        (EXPERTS | {"mlp_only_layers": [0]}, ["mlp_only_layers = [0]"]),
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


@pytest.mark.parametrize(
    ("device", "built_for", "words"),
    [
        ("cuda", "cpu", ["on GPUs", "built for the CPU", "--device cpu"]),
        ("cpu", "cuda", ["on the CPU", "built for GPUs", "--device cuda"]),
    ],
)
def test_packages_of_the_other_device(problems, monkeypatch, device, built_for, words):
    monkeypatch.setattr("rlsys.preflight.machine.device_of_packages", lambda: built_for)
    found = problems(device=device)
    for word in words:
        assert word in only(found)
    assert problems(device=built_for) == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # whose hosts have their own packages
    assert problems(device=device) == []


@pytest.mark.parametrize(
    ("backend", "device", "variable", "words"),
    [
        ("fused", "cpu", None, ["attention_backend = fused", "one kind only", "set it to auto"]),
        ("flash", "cuda", None, ["attention_backend = flash", "pip install flash-attn"]),
        ("unfused", "cuda", "NVTE_FLASH_ATTN", ["NVTE_FLASH_ATTN=1", "unfused", "unset it"]),
    ],
)
def test_attention_that_is_not_to_be_had(problems, monkeypatch, backend, device, variable, words):
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    found = problems(device=device, policy={"attention_backend": backend})
    for word in words:
        assert word in only(found)
    assert found[0].only_here == (device == "cuda")


@pytest.mark.parametrize(
    "policy", [{"attention_backend": "fused"}, {"world_size": 2, "context_parallel_size": 2}]
)
def test_attention_without_float32(problems, policy, tmp_path):
    model = {"path": str(write_model(tmp_path / "other")), "dtype": "float32"}
    found = problems(device="cuda", policy=policy, model=model)
    assert "no kernels for float32" in only(found)
    assert not found[0].only_here


def test_attention_of_gpus_may_be_had_elsewhere_in_the_cluster(problems, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert problems(device="auto", policy={"attention_backend": "fused"}) == []


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
        (["--rollout.tensor_parallel_size", "64"], ["8 attention heads", "size 32", "4 or 8"]),
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


def test_whole_weights_are_no_problem_and_missing_shards_are(problems, tmp_path):
    folder = write_model(tmp_path / "other")
    assert problems(model={"path": str(folder)}) == []
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors" in only(problems(model={"path": str(folder)}))


@pytest.mark.parametrize(
    ("there_are", "overrides", "words"),
    [
        (
            1,
            [],
            [
                "needs 2 GPUs (policy 1, rollout 1), and this machine shows 1",
                "at least 2, one for the policy and one for a rollout engine",
                "--device cpu",
                "RAY_ADDRESS",
                "not: lower",
                "not: world_size",
            ],
        ),
        (
            3,
            ["--rollout.num_engines", "3"],
            [
                *("needs 4 GPUs (policy 1, rollout 3)", "shows 3", "lower rollout.num_engines"),
                *("raise rollout.engines_per_gpu", "not: policy.world_size", "not: placement"),
            ],
        ),
        (2, ["--policy.world_size", "2"], ["lower policy.world_size, or", "not: num_engines"]),
        (
            2,
            ["--grpo.beta", "0.1", "--reference.placement", "own"],
            ["shows 2: set reference.placement to policy, or add GPUs"],
        ),
        (0, [], ["shows 0", "--device cpu"]),
    ],
)
def test_more_gpus_than_this_machine_has(problems, gpus, monkeypatch, there_are, overrides, words):
    gpus(there_are)
    found = problems("--device", "cuda", *overrides)
    for word in words:
        assert (word.removeprefix("not: ") in only(found)) != word.startswith("not: ")
    assert found[0].only_here
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # whose GPUs nobody sees from here
    assert problems("--device", "cuda", *overrides) == []


@pytest.mark.parametrize(("tp", "fits"), [(2, True), (4, True), (6, False)])
def test_engines_whose_tensor_parallel_size_fits_no_kv_heads(problems, tmp_path, tp, fits):
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
            ["rollout.tensor_parallel_size = 16", "8 attention heads"],
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
    val_dataset = problems("--data.val_dataset", "a.jsonl#many")
    assert "a number of rows belongs behind #" in only(val_dataset)


def test_fewer_rows_than_a_step_needs(problems):
    text = only(problems(rollout={"generation_batch_size": 4 * 21}))
    assert "20 rows" in text
    assert "21 prompts" in text


def test_an_unknown_reward_lists_the_known(problems):
    text = only(problems("--reward.reward_funcs", "countdwn", "format"))
    assert "Did you mean 'countdown'?" in text
    assert "cosine, countdown, exact_match" in text


def test_a_plugin_that_raises_shows_its_traceback(problems, tmp_path):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text("x = 1\nimport nothing_of_this_name\n")
    found = problems("--reward.external_plugins", str(plugin), "--reward.reward_funcs", "mine")
    assert "my_reward.py" in found[0].text
    assert "line 2" in found[0].text
    assert "No module named 'nothing_of_this_name'" in found[0].text
    assert "'mine'" in found[1].text
    assert "plugin above" in found[1].text


def test_a_plugin_makes_its_reward_known(problems, tmp_path):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import register_reward\n"
        "@register_reward('preflight_mine')\n"
        "def mine(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    overrides = ["--reward.external_plugins", str(plugin), "--reward.reward_funcs"]
    assert problems(*overrides, "preflight_mine") == []


HEADS = {
    "def {}(completions):": "unexpected keyword argument",
    "def {}(completions, nums):": "unexpected keyword argument",
    "async def {}(completions, prompts):": "unexpected keyword argument",
    "def {}(completions, /, **columns):": "positional",
    "def {}(completions, **columns):": None,
    "def {}(completions, nums, **columns):": None,
    "def {}(**columns):": None,
    "def {}(completions, max_completion_length, **columns):": None,
    "class {}(ORM):\n def __call__(self, completions):": "unexpected keyword argument",
    "class {}(ORM):\n def __call__(self, **columns):": "too many positional arguments",
    "class {}(ORM):\n def __call__(self, texts, nums, **columns):": None,
    "class {}(ORM):\n @staticmethod\n def __call__(texts, **columns):": None,
    "class {}(ORM):\n @classmethod\n def __call__(cls, texts, **columns):": None,
    "class {}(ORM):\n @classmethod\n def __call__(cls, texts):": "unexpected keyword argument",
    "class {}:\n async def __call__(self, texts, *more, **columns):": None,
    "@trl_style\ndef {}(completions, prompts, **kwargs):": None,
    "@trl_style\ndef {}(completions, prompts):": "unexpected keyword argument",
}
"""Signatures of reward functions, and what is wrong with them."""


@pytest.mark.parametrize(("index", "words"), list(enumerate(HEADS.values())))
def test_a_reward_function_that_cannot_be_called(problems, tmp_path, index, words):
    name = f"preflight_{index}"
    head = list(HEADS)[index].format(name)
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import ORM, register_reward, trl_style\n"
        f"@register_reward({name!r})\n{head} return [0.0] * 4\n"
    )
    found = problems("--reward.external_plugins", str(plugin), "--reward.reward_funcs", name)
    if words is None:
        assert found == []
        return
    text = only(found)
    assert f"reward.reward_funcs: reward function {name!r} cannot be called: " in text
    assert words in text
    assert "end the function's parameters with **columns" in text
    assert not found[0].only_here


@pytest.mark.parametrize("base", ["ORM", "AsyncORM", "object"])
def test_a_reward_class_that_scores_nothing(problems, tmp_path, base):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import ORM, AsyncORM, register_reward\n"
        f"@register_reward('preflight_{base}')\nclass Silent({base}):\n pass\n"
    )
    overrides = ["--reward.external_plugins", str(plugin), "--reward.reward_funcs"]
    text = only(problems(*overrides, f"preflight_{base}"))
    assert "reward.reward_funcs: the reward class Silent has no method __call__(self, comp" in text


def test_every_reward_function_of_rlsys_can_be_called():
    for name, registered in orms.items():
        if registered.__module__.startswith("rlsys.rewards."):  # and no test registered it
            given = {column: [] for column in (*column_use(name).needed, *OWN_COLUMNS)}
            call_arguments(name, registered, given)


def rows(path, *columns, copies=20):
    """A file with a row for each of `columns`, beside a prompt, so often each."""
    lines = [json.dumps({"prompt": "1 + 1?"} | own) + "\n" for own in columns]
    path.write_text("".join(line * copies for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("columns", "data", "missing"),
    [
        ([{"numbers": [1, 1]}], {}, "the column nums, which the data does not have. It has: numb"),
        ([{}], {}, "the column nums, which the data does not have. It has: none besides"),
        ([{"numbers": [1, 1]}], {"columns": {"numbers": "nums"}}, None),
        ([{"nums": [1, 1]}], {"columns": {"nums": "numbers"}}, "the column nums, which"),
        # Another row has it, of which the first rows tell nothing: the others see None.
        ([{}, {"nums": [1, 1]}], {}, None),
        ([{}], {"streaming": True}, "the column nums, which"),
    ],
)
def test_a_column_that_no_dataset_has(problems, tmp_path, columns, data, missing):
    path = rows(tmp_path / "own.jsonl", *columns)
    found = problems(data={"dataset": [path], **data})
    if missing is None:
        assert found == []
    else:
        assert only(found).startswith("reward.reward_funcs: reward function 'countdown' needs")
        assert missing in only(found)
        assert not found[0].only_here


def test_a_setting_of_a_class_is_no_column(problems, tmp_path):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import ORM, register_reward\n"
        "@register_reward('preflight_settled')\n"
        "class Settled(ORM):\n"
        " def __init__(self, nums): pass\n"
        " def __call__(self, completions, nums, **columns): return [0.0] * len(completions)\n"
    )
    reward = {
        "external_plugins": [str(plugin)],
        "reward_funcs": ["preflight_settled"],
        "reward_params": {"preflight_settled": {"nums": 3}},
    }
    data = {"dataset": [rows(tmp_path / "own.jsonl", {"target": 2})]}
    text = only(problems(reward=reward, data=data))
    assert "reward function 'preflight_settled' needs the column nums" in text


def test_a_column_that_a_reward_function_does_not_take(problems, tmp_path):
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(
        "from rlsys.rewards import register_reward\n"
        "@register_reward('preflight_exact')\n"
        f"def exact({', '.join(OWN_COLUMNS)}, nums): return [0.0] * len(completions)\n"
    )
    reward = {"external_plugins": [str(plugin)], "reward_funcs": ["preflight_exact"]}
    fitting = {"dataset": [rows(tmp_path / "own.jsonl", {"nums": [1]})]}
    assert problems(reward=reward, data=fitting) == []
    more = {"dataset": [rows(tmp_path / "more.jsonl", {"nums": [1], "target": 2})]}
    text = only(problems(reward=reward, data=more))
    assert "'preflight_exact' cannot be called: got an unexpected keyword argument 'tar" in text


def test_a_column_may_be_in_another_dataset_and_in_files_of_columns(problems, tmp_path):
    path = rows(tmp_path / "own.jsonl", {})
    table = tmp_path / "own.csv"
    table.write_text("prompt,number\na,1\n")
    assert "It has: number." in only(problems(data={"dataset": [path, str(table)]}))
    table.write_text("prompt,nums\na,1\n")
    assert problems(data={"dataset": [path, str(table)]}) == []


def test_a_column_that_only_held_out_data_lack(problems, tmp_path):
    data = {"val_dataset": [rows(tmp_path / "own.jsonl", {"target": 2})]}
    assert problems(data=data) == []  # nothing is evaluated
    assert "which the held-out data does not have" in only(problems("--eval_steps", "5", data=data))


def test_columns_that_a_preprocessor_makes(problems, tmp_path):
    plugin = tmp_path / "numbers.py"
    plugin.write_text(
        "from rlsys.data import register_preprocessor\n"
        "@register_preprocessor('preflight_numbers')\n"
        "def numbers(row):\n    return row | {row['name']: [1, 1]}\n"
    )
    plugins = {"external_plugins": [str(plugin)], "preprocessor": ["preflight_numbers"]}
    path = rows(tmp_path / "own.jsonl", {"name": "nums"})
    assert problems(data={"dataset": [path], **plugins}) == []
    path = rows(tmp_path / "own.jsonl", {"name": "numbers"})
    text = only(problems(data={"dataset": [path], **plugins}))
    assert "the column nums, which the data does not have. It has: name, numbers." in text


def test_columns_are_left_to_the_run_where_a_look_cannot_tell(problems, tmp_path, monkeypatch):
    monkeypatch.setattr("rlsys.preflight.data.MOST_ROWS", 30)
    short, longer = rows(tmp_path / "a.jsonl", {}, copies=30), rows(tmp_path / "b.jsonl", {}, {})
    assert "the column nums, which" in only(problems(data={"dataset": [short]}))
    assert problems(data={"dataset": [longer]}) == []
    (tmp_path / "folder").mkdir()
    assert problems(data={"dataset": [short, str(tmp_path / "folder")]}) == []
    # What is wrong with rows is told alone.
    one_bad = '{"prompt": 3}\n' + '{"prompt": "a"}\n' * 3
    for content, words in ((one_bad, "found 3"), ("", "no rows")):
        (tmp_path / "bad.jsonl").write_text(content)
        assert words in only(problems(data={"dataset": [str(tmp_path / "bad.jsonl")]}))


@pytest.mark.parametrize(
    ("file", "content"),
    [("metrics.jsonl", "{}\n"), ("config.yaml", "max_steps: 1\n"), ("status", "running\n")],
)
def test_an_output_directory_with_another_run_says_how_to_go_on(problems, tmp_path, file, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text(content)
    text = only(problems())
    assert "holds another run, without a checkpoint: start from step 0 with --overwrite" in text
    assert "--output_dir" in text
    assert "--checkpoint.resume" not in text  # there is nothing to continue from
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    assert "--checkpoint.resume" in only(problems())
    assert problems("--overwrite") == []


@pytest.mark.parametrize("resume", [[], ["--checkpoint.resume"]])
@pytest.mark.parametrize("folder", ["interrupted", "final", "checkpoints/step-3"])
def test_a_run_does_not_move_aside_what_it_reads(problems, tmp_path, folder, resume):
    """Whoever starts from an interrupted run's weights is asked for --overwrite, and takes it."""
    model = tmp_path / "run" / folder
    model.parent.mkdir(parents=True, exist_ok=True)
    write_run(tmp_path)
    (tmp_path / "model").rename(model)
    found = problems("--model.path", str(model), "--overwrite", *resume)
    if resume and folder.startswith("checkpoints"):
        assert found == []  # nothing is moved
    else:
        assert f"overwrite: moves aside {model}, which this run reads" in only(found)
        assert "--output_dir" in only(found)


@pytest.mark.parametrize("holds", ["nothing", "a run without a checkpoint"])
def test_what_says_that_there_is_nothing_to_resume_names_what_works(problems, tmp_path, holds):
    """A run that was interrupted in its first step was refused whatever its user tried."""
    if holds != "nothing":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    text = only(problems("--checkpoint.resume"))
    assert ("leave checkpoint.resume out" in text) == (problems() == [])
    assert "add --overwrite" in text
    assert problems("--checkpoint.resume", "--overwrite") == []


def test_a_run_that_failed_while_starting_can_be_started_again(problems, tmp_path):
    run = RunDir(tmp_path / "run")
    run.write_status(ENDED)
    run.metrics.touch()
    save_config(load_config(write_run(tmp_path)).config, run.config)
    assert problems() == []


def test_resuming_needs_a_checkpoint(problems, tmp_path):
    assert "no checkpoint" in only(problems("--checkpoint.resume"))
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert problems("--checkpoint.resume") == []


@pytest.mark.parametrize(
    ("step", "has_ended", "is_refused"),
    [(11, False, True), (10, True, True), (10, False, False), (9, True, False)],
)
def test_resuming_needs_steps_to_take(problems, tmp_path, step, has_ended, is_refused):
    """After the last step only the final model may be missing; it would be replaced otherwise."""
    (tmp_path / "run" / "checkpoints" / f"step-{step}").mkdir(parents=True)
    if has_ended:
        (tmp_path / "run" / "final").mkdir()
    found = problems("--checkpoint.resume")
    assert bool(found) == is_refused
    if is_refused:
        assert f"has step {step}" in only(found)
        assert "raise --max_steps" in only(found)


def test_an_output_directory_that_is_a_file(problems, tmp_path):
    (tmp_path / "run").touch()
    found = problems()
    assert only(found) == (
        f"output_dir: {tmp_path / 'run'} is no folder: choose another one with --output_dir"
    )
    assert found[0].only_here


@pytest.mark.parametrize("place", ["file", "link"])
@pytest.mark.parametrize("option", [[], ["--checkpoint.resume"]])
def test_an_output_directory_below_what_is_no_folder(problems, tmp_path, place, option):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    found = problems("--output_dir", str(tmp_path / place / "a" / "b"), *option)
    assert only(found) == (
        f"output_dir: {tmp_path / place / 'a' / 'b'} cannot be made, {tmp_path / place} is no "
        "folder: choose another one with --output_dir"
    )
    assert found[0].only_here


def test_an_output_directory_that_no_file_system_takes(problems, tmp_path):
    path = tmp_path / ("a" * 300) / "b"
    found = problems("--output_dir", str(path))
    assert only(found) == (
        f"output_dir: {path} cannot be made (File name too long): choose another one with "
        "--output_dir"
    )
    assert found[0].only_here


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_directory_without_the_permission_to_write(
    problems, tmp_path, monkeypatch, exists
):
    """Root may write anywhere, so the answer of the system is made up."""
    folder, closed = tmp_path / "closed" / "run", tmp_path / "closed"
    folder.mkdir(parents=True)
    if not exists:
        folder.rmdir()
    of_system = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode: of_system(path, mode) and closed not in (path, path.parent)
    )
    found = problems("--output_dir", str(folder))
    where = "is a folder that you may not write in:" if exists else f"you may not write in {closed}"
    assert where in only(found)
    assert found[0].only_here


def test_a_tracker_that_nobody_registered(problems):
    text = only(problems("--tracking.report_to", "tensorbord"))
    assert "Did you mean 'tensorboard'?" in text


def test_a_tracker_that_is_not_installed(problems, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an absent module looks like
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    assert "pip install wandb" in only(problems("--tracking.report_to", "wandb"))


def test_all_problems_are_told_at_once(problems, tmp_path):
    (tmp_path / "run").touch()
    found = problems(
        "--reward.reward_funcs",
        "nothing",
        "--model.path",
        "./nowhere",
        "--data.dataset",
        "nowhere.jsonl",
    )
    assert len(found) == 4
