"""The memory estimate: parameters as counted by transformers, sizes as measured."""

import json
from unittest import mock

import pytest
from config_cases import EXPERTS, MODEL_SIZES, write_config, write_distill_run, write_model
from published_models import QWEN_2_5

from rlsys.config import DistillConfig
from rlsys.config.load import load_config, load_config_as
from rlsys.model.families.base import LayerShape
from rlsys.model.kv_cache import kv_layers
from rlsys.model.memory import GIB, estimate_memory
from rlsys.model.pipeline import rank_params
from rlsys.model.shape import read_model_shape
from rlsys.preflight.memory import estimate_trained, gpu_warnings


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_transformers_has_them(tmp_path, model_type, tied):
    import torch
    import transformers

    sizes = {"model_type": model_type, "tie_word_embeddings": tied, "num_key_value_heads": 2}
    if model_type == "qwen3_moe":
        sizes |= EXPERTS
    folder = write_model(tmp_path / "model", **sizes)
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert read_model_shape(folder).num_params == model.num_parameters()


def test_ranks_share_experts_and_their_optimizer_state(tmp_path):
    write_model(tmp_path / "model", **EXPERTS)
    policy = {"world_size": 4, "expert_model_parallel_size": 4}
    shared, shape = estimates(tmp_path, "cuda", policy=policy)
    replicas, _ = estimates(tmp_path, "cuda", policy={"world_size": 4})
    _, experts = shape.layer_params(shape.layers)
    weights = [found["policy"].gib["weights"] * GIB for found in (replicas, shared)]
    assert weights[0] - weights[1] == pytest.approx(experts * 3 / 4 * 2)
    # Each expert's state is in one place either way.
    states = [found["policy"].gib["optimizer"] for found in (replicas, shared)]
    assert states[0] == pytest.approx(states[1])


def estimates(tmp_path, device, **sections):
    folder = tmp_path / "model"
    shape = read_model_shape(folder if folder.exists() else write_model(folder))
    config = load_config(write_config(tmp_path, **sections)).config
    return {e.role: e for e in estimate_memory(config, shape, shape, device=device)}, shape


def test_the_policy_needs_16_bytes_a_parameter_in_fp32_and_18_in_bf16(tmp_path):
    for device, bytes_each in (("cpu", 16), ("cuda", 18)):
        found, shape = estimates(tmp_path, device)
        model = sum(found["policy"].gib[k] for k in ("weights", "gradients", "optimizer"))
        # All but the final norm, which is too small to count.
        assert model * GIB == pytest.approx(bytes_each * shape.num_params, rel=0.01)


def test_adapters_alone_have_gradients_and_optimizer_state(tmp_path):
    full, shape = estimates(tmp_path, "cuda", grpo={"beta": 0.1})
    lora = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
    found, _ = estimates(tmp_path, "cuda", policy={"lora": lora}, grpo={"beta": 0.1})
    by_layer = 4 * (64 + 8 * 32) + 4 * (128 + 64)
    adapters = MODEL_SIZES["num_hidden_layers"] * by_layer
    whole, own = full["policy"].gib, found["policy"].gib
    assert (own["weights"] - whole["weights"]) * GIB == pytest.approx(adapters * 2)
    assert own["gradients"] * GIB == pytest.approx(adapters * 4)
    assert own["optimizer"] * GIB == pytest.approx(adapters * 12)
    head = shape.embedding_params * 6  # its gradient, in two types
    assert (whole["logits"] - own["logits"]) * GIB == pytest.approx(head)
    assert "reference" in full  # the policy without its adapter is the reference
    assert "reference" not in found


def test_engines_have_a_place_for_the_adapter_and_the_one_that_comes(tmp_path):
    lora = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
    policy = {"lora": lora}
    plain, shape = estimates(tmp_path, "cuda", policy=policy, weight_sync={"lora": "merged"})
    found, _ = estimates(tmp_path, "cuda", policy=policy)
    assert "adapter" not in plain["rollout"].gib
    layers, rank = MODEL_SIZES["num_hidden_layers"], 8  # the smallest that vLLM has
    q, kv, o = 64 + 256, 64 + 128, 256 + 64
    slot = rank * (layers * (q + 2 * kv + o + 3 * (64 + 128)) + 2 * (shape.vocab_size + 64))
    adapter = 4 * layers * (q + 64 + 128)
    assert found["rollout"].gib["adapter"] * GIB == pytest.approx(2 * (slot + 2 * adapter))
    assert found["rollout"].total_gib > plain["rollout"].total_gib
    # Ranks of an engine share what is on the parallel side of a layer, and no more.
    pair, _ = estimates(tmp_path, "cuda", policy=policy, rollout={"tensor_parallel_size": 2})
    shared = rank * layers * (256 + 2 * 128 + 256 + 3 * 128) / 2
    missing = found["rollout"].gib["adapter"] - pair["rollout"].gib["adapter"]
    assert missing * GIB == pytest.approx(2 * shared)


def test_frozen_parameters_have_neither(tmp_path):
    whole, shape = estimates(tmp_path, "cuda")
    policy = {"freeze_parameters": ["model.embed_tokens"]}
    found, _ = estimates(tmp_path, "cuda", policy=policy)
    share = 1 - shape.embedding_params / shape.num_params
    for purpose in ("gradients", "optimizer"):
        expected = whole["policy"].gib[purpose] * share
        assert found["policy"].gib[purpose] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("policy", "by_parameter"),
    [
        ({}, 18),
        ({"use_precision_aware_optimizer": True}, 16),
        (
            {"use_precision_aware_optimizer": True, "main_grads_dtype": "bf16"}
            | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp8", "main_params_dtype": "fp16"},
            2 + 2 + 2 + 1 + 2,
        ),
        (
            {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
            | {"optimizer_offload_fraction": 0.25},
            2 + 4 + 0.75 * 12,
        ),
        ({"fp8_format": "hybrid", "fp8_param_gather": True}, 18),
        ({"fp8_format": "hybrid", "use_precision_aware_optimizer": True}, 18),
    ],
    ids=str,
)
def test_types_and_places_of_the_optimizers_state_are_counted(tmp_path, policy, by_parameter):
    found, shape = estimates(tmp_path, "cuda", policy=policy)
    model = sum(found["policy"].gib[k] for k in ("weights", "gradients", "optimizer"))
    assert model * GIB == pytest.approx(by_parameter * shape.num_params, rel=0.01)
    has_copies = "fp8_format" in policy and "fp8_param_gather" not in policy
    assert ("fp8 weights" in found["policy"].gib) == has_copies


def test_replicas_share_the_optimizer_state_only_when_it_is_distributed(tmp_path):
    alone, _ = estimates(tmp_path, "cuda")
    for distributed, share in ((True, 4), (False, 1)):
        policy = {"world_size": 4, "use_distributed_optimizer": distributed}
        found, _ = estimates(tmp_path, "cuda", policy=policy)
        whole = alone["policy"].gib["optimizer"]
        assert found["policy"].gib["optimizer"] == pytest.approx(whole / share)
        assert found["policy"].gib["weights"] == alone["policy"].gib["weights"]


def test_tensor_and_pipeline_ranks_hold_the_model_together(tmp_path):
    shape = read_model_shape(write_model(tmp_path / "untied", tie_word_embeddings=False))
    whole, _ = rank_params(shape, [[0, 1, 2, 3]], tp=1, ep=1)
    assert rank_params(shape, [[0, 1, 2, 3]], tp=2, ep=1) == (whole // 2, 0)
    # The two stages have an embedding each: the first one's, and the head.
    assert rank_params(shape, [[0, 1], [2, 3]], tp=1, ep=1) == (whole // 2, 0)


def test_the_largest_of_uneven_stages_counts(tmp_path):
    def policy(layout, ranks=2):
        policy = {
            "world_size": ranks,
            "pipeline_parallel_size": ranks,
            "pipeline_layout": layout,
        }
        found, shape = estimates(tmp_path, "cuda", policy=policy)
        return found["policy"].gib, shape

    even, shape = policy("Ett|ttL")
    assert even == policy(None)[0]
    one_layer, _ = shape.layer_params(shape.layers[:1])
    for uneven in ("Et|tttL", "Ettt|tL"):
        larger, _ = policy(uneven)
        assert (larger["weights"] - even["weights"]) * GIB == pytest.approx(one_layer * 2)
    # The first rank waits for the second with the activations of two micro-batches.
    activations = [policy(layout)[0]["activations"] for layout in ("Ettt|tL", "Ett|ttL", "Et|tttL")]
    assert activations == pytest.approx([activations[0], activations[0] / 1.5, activations[0] / 2])
    # Two chunks a rank: three chunks of each are in flight at once, and two micro-batches' worth.
    assert policy("Et|t|t|tL")[0]["activations"] == pytest.approx(activations[1] * 1.25)


def test_recompute_and_smaller_micro_batches_need_less(tmp_path):
    def activations(device="cuda", **policy):
        found, _ = estimates(tmp_path, device, policy=policy)
        return found["policy"].gib["activations"]

    assert activations(recompute="full") < activations(recompute="selective") < activations()
    norms_too = {"recompute": "selective", "recompute_modules": ["mlp", "layernorm"]}
    assert activations("cpu", **norms_too) < activations("cpu", recompute="selective")
    # Inputs of four layers and one layer; of two groups and two layers; of two layers and three.
    groups = {"recompute": "full", "recompute_num_layers": 2}
    first = groups | {"recompute_method": "block"}
    assert activations(recompute="full") < activations(**groups) < activations(**first)
    assert activations(**first) < activations()
    two_ranks = {"world_size": 2, "context_parallel_size": 2}
    assert activations(**two_ranks) == pytest.approx(activations() / 2)
    assert activations(micro_batch_size=4) == pytest.approx(activations() / 2)
    assert activations(max_tokens_per_micro_batch=128) == pytest.approx(activations() / 8)


def test_kept_logits_are_a_number_for_every_token_and_vocabulary_entry(tmp_path):
    def logits(**policy):
        found, shape = estimates(tmp_path, "cuda", policy=policy)
        return found["policy"].gib["logits"], shape

    again, shape = logits()
    kept, _ = logits(recompute_logits=False)
    tokens = 8 * 128  # micro_batch_size rows of the greatest length
    assert (kept - again) * GIB == pytest.approx(tokens * shape.vocab_size * 2)


def test_an_fp32_head_is_a_copy_of_the_output_layer(tmp_path):
    def logits(fp32, device="cuda"):
        found, shape = estimates(tmp_path, device, model={"fp32_lm_head": fp32})
        return found["policy"].gib["logits"], shape

    (narrow, shape), (wide, _) = logits(False), logits(True)
    # The same for a chunk's logits, in three tensors.
    copies = 3 * 2 * 8 * 128 * shape.vocab_size
    assert (wide - narrow) * GIB == pytest.approx(shape.embedding_params * 4 + copies)
    assert logits(True, "cpu") == logits(False, "cpu")  # float32 as it is


def test_the_kv_cache_holds_the_sequences_of_an_engine(tmp_path):
    found, _ = estimates(tmp_path, "cuda")
    token = 2 * MODEL_SIZES["num_hidden_layers"] * MODEL_SIZES["num_key_value_heads"] * 32 * 2
    assert found["rollout"].gib["KV cache"] * GIB == pytest.approx(16 * 128 * token)
    found, _ = estimates(tmp_path, "cpu", rollout={"kv_cache_memory_mb": 512})
    assert found["rollout"].gib["KV cache"] == 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_quantised_engines_hold_embeddings_in_bfloat16_and_a_byte_for_all_else(tmp_path, tied):
    write_model(tmp_path / "model", tie_word_embeddings=tied)
    plain, shape = estimates(tmp_path, "cuda")
    found, _ = estimates(tmp_path, "cuda", rollout={"quantization": "fp8"})
    embeddings = shape.vocab_size * shape.hidden_size * (1 if tied else 2)
    expected = 2 * embeddings + (shape.num_params - embeddings)
    assert found["rollout"].gib["weights"] * GIB == pytest.approx(expected)
    assert "rollout.quantization" in found["rollout"].formula["weights"]
    assert found["policy"] == plain["policy"]
    assert found["rollout"].gib["KV cache"] == plain["rollout"].gib["KV cache"]


def test_a_draft_model_needs_its_weights_and_its_own_keys_and_values(tmp_path):
    plain, shape = estimates(tmp_path, "cuda")
    small = read_model_shape(write_model(tmp_path / "draft", num_hidden_layers=1))
    drafts = {"model": str(tmp_path / "draft"), "num_speculative_tokens": 2}
    found, _ = estimates(tmp_path, "cuda", rollout={"speculative_config": drafts})
    mine, before = found["rollout"], plain["rollout"]
    assert mine.gib["draft model"] * GIB == pytest.approx(small.num_params * 2)
    layers = (shape.num_layers + 1) / shape.num_layers
    assert mine.gib["KV cache"] == pytest.approx(before.gib["KV cache"] * layers)
    assert "of the draft model" in mine.formula["KV cache"]


def test_windowed_layers_keep_the_window_or_the_prompt(tmp_path):
    def numbers(**sizes):
        folder = write_model(tmp_path / "window", **sizes)
        config = load_config(write_config(tmp_path, data={"max_prompt_length": 32})).config
        shape = read_model_shape(folder)
        found = {e.role: e for e in estimate_memory(config, shape, shape, device="cuda")}
        return found["rollout"].gib["KV cache"] * GIB, found["rollout"].formula["KV cache"]

    window = {"model_type": "mistral", "architectures": None}
    full, _ = numbers(**window, sliding_window=None)
    for size, tokens in ((48, 48), (8, 32), (4096, 96)):
        found, text = numbers(**window, sliding_window=size)
        assert found == pytest.approx(full * tokens / 96)
        assert f"{tokens} tokens x " in text
        assert "windowed layers" in text


def test_vllm_gives_blocks_to_groups_of_layers_of_one_kind():
    def layers(full, windowed):
        shape = mock.Mock(layers=(LayerShape(),) * full + (LayerShape(window=100),) * windowed)
        return [(kind.layers, kind.tokens) for kind in kv_layers(shape, row=1000, prompt=50)]

    assert layers(4, 22) == [(4, 1000), (24, 100)]  # Gemma 3 1B
    assert layers(8, 9) == [(9, 1000), (9, 100)]
    assert layers(3, 0) == [(3, 1000)]


def test_the_reference_is_in_the_estimate_only_with_a_kl_term(tmp_path):
    assert set(estimates(tmp_path, "cpu")[0]) == {"policy", "rollout"}
    with_kl, _ = estimates(tmp_path, "cpu", grpo={"beta": 0.1})
    assert set(with_kl) == {"policy", "rollout", "reference"}


QWEN_1_5B, QWEN_7B = QWEN_2_5["Qwen2.5-1.5B"], QWEN_2_5["Qwen2.5-7B"]


def of_sizes(tmp_path, sizes, **sections):
    (tmp_path / "config.json").write_text(json.dumps(MODEL_SIZES | sizes))
    shape = read_model_shape(tmp_path)
    config = load_config(write_config(tmp_path, **sections)).config
    return config, estimate_memory(config, shape, shape, device="cuda")


def test_engines_that_share_a_gpu_are_estimated_as_measured(tmp_path):
    """35.0 GiB for two engines of 1.5B parameters on an H200."""
    sections = {
        "data": {"max_prompt_length": 512},
        "rollout": {"max_completion_length": 1024, "num_engines": 2, "engines_per_gpu": 2},
    }
    _, found = of_sizes(tmp_path, QWEN_1_5B, **sections)
    (rollout,) = (estimate for estimate in found if estimate.role == "rollout")
    assert 2 * rollout.total_gib == pytest.approx(35.0, rel=0.05)


@pytest.mark.parametrize(
    ("sizes", "sections", "gpu_gib", "words"),
    [
        (QWEN_1_5B, {}, 139.8, []),
        (QWEN_7B, {}, 130.0, ["GPU of the policy needs", "130.0", "policy.tensor_parallel_size"]),
        (QWEN_7B, {"policy": {"world_size": 8}}, 139.8, []),
        (QWEN_1_5B, {"grpo": {"beta": 0.1}}, 30, ["shared with the reference"]),
        (QWEN_7B, {"policy": {"world_size": 16, "tensor_parallel_size": 4}}, 22, ["engine"]),
    ],
)
def test_an_estimate_above_the_gpus_memory_is_a_warning(tmp_path, sizes, sections, gpu_gib, words):
    found = gpu_warnings(*of_sizes(tmp_path, sizes, **sections), gpu_gib)
    assert len(found) == bool(words), found
    for word in words:
        assert word in found[0]


@pytest.mark.parametrize(
    ("policy", "gib"),
    [
        ({}, 59.26),
        ({"recompute_logits": False}, 63.74),
        ({"world_size": 2, "overlap_grad_reduce": False}, 50.62),
        ({"world_size": 2, "tensor_parallel_size": 2}, 29.73),
        ({"world_size": 2, "context_parallel_size": 2}, 34.90),
    ],
    ids=str,
)
def test_an_update_on_a_gpu_is_estimated_as_measured(tmp_path, policy, gib):
    """torch's peak in updates of benchmarks/policy_update.py on an H200."""
    rollout = {"generation_batch_size": 64, "num_generations": 4, "max_completion_length": 896}
    sections = {"rollout": rollout, "data": {"max_prompt_length": 128}}
    sections["policy"] = {"max_tokens_per_micro_batch": 16384, **policy}
    _, found = of_sizes(tmp_path, QWEN_1_5B, **sections)
    parts = found[0].gib
    outside = parts["process"] + parts["weight sync"]
    assert found[0].total_gib - outside == pytest.approx(gib, rel=0.01)


def test_a_student_that_samples_sends_weights_and_its_engine_caches_a_step(tmp_path):
    path = write_distill_run(tmp_path)

    def gib(*words):
        config = load_config_as(DistillConfig, path, words).config
        found = estimate_trained(config, read_model_shape(tmp_path / "model"), "cuda")
        return {estimate.role: estimate.gib for estimate in found}

    given, own = gib("--distill.lmbda", "0"), gib()
    assert given.keys() == {"policy", "teacher"}
    assert "weight sync" not in given["policy"]
    assert own["policy"]["weight sync"] == own["rollout"]["weight sync"] > 0
    twice = gib("--policy.global_batch_size", "8")
    assert twice["rollout"]["KV cache"] == 2 * own["rollout"]["KV cache"]
    head = own["policy"]["teacher's head"]
    in_fp32 = gib("--model.fp32_lm_head", "true")["policy"]["teacher's head"]
    assert in_fp32 == pytest.approx(3 * head)  # 2 bytes of bfloat16, and a copy of 4
    assert "teacher's head" not in gib("--distill.loss_top_k", "5")["policy"]
