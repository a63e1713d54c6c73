"""Adapters beside Transformer Engine's layers: norms fused with them, and grouped experts."""

import shutil

import pytest
import torch
from gpu_cases import gpu_config, long_batch, transformers_logprobs
from gpu_lab import train
from policy_cases import exported
from random_adapter import save_random_adapter
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_qwen3_moe

from rlsys.config import LoraConfig

BATCH = long_batch(12, 400)
LORA = {"rank": 8, "alpha": 8.0}
LAYOUTS = {
    "one rank": {},
    "TP 2": {"world_size": 2, "tensor_parallel_size": 2},
    "PP 2": {"world_size": 2, "pipeline_parallel_size": 2},
}
BOUNDS = {"dense": 2e-4, "experts": 1e-3}


@pytest.fixture(scope="module")
def folders(gpu_models, tmp_path_factory):
    """Model and adapter folders, by kind."""
    root = tmp_path_factory.mktemp("gpu-lora")
    sizes = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4, "num_experts": 16}
    sizes |= {"num_experts_per_tok": 4, "moe_intermediate_size": 128}
    sizes |= {"max_position_embeddings": 4096, "initializer_range": 0.05}
    save_tiny_qwen3_moe(root / "experts", seed=0, **sizes)
    models = {"dense": gpu_models["qwen3-tied", 0], "experts": root / "experts"}
    for kind, model in models.items():
        save_random_adapter(model, root / f"{kind}-adapter", LoraConfig(**LORA))
    return {kind: (model, root / f"{kind}-adapter") for kind, model in models.items()}


def config_of(folder, lora, layout="one rank", *, experts=False, dtype="float32", **policy):
    options = LAYOUTS[layout] | {"use_distributed_optimizer": False} | policy
    if experts and layout == "TP 2":
        options |= {"expert_model_parallel_size": 2}
    return gpu_config(
        folder,
        num_completions=len(BATCH.lengths),
        dtype=dtype,
        lora=lora,
        max_tokens_per_micro_batch=2048,
        **options,
    )


@pytest.fixture(scope="module")
def alone(lab, folders):
    """Log-probs, gradient of the adapter, and merged weights on one rank, by kind."""
    known = {}

    def compute(kind):
        if kind not in known:
            folder, adapter = folders[kind]
            policy = lab.policy(config_of(folder, {"path": str(adapter)}))
            known[kind] = (
                policy.compute_logprobs(BATCH)[0],
                policy.call("adapter_gradient", BATCH, "sft")[0],
                policy.call("merged")[0],
            )
        return known[kind]

    return compute


@pytest.mark.gpu(1)
@pytest.mark.parametrize("kind", BOUNDS)
def test_logprobs_are_those_of_merged_weights(alone, folders, tmp_path, kind):
    logprobs, _, merged = alone(kind)
    shutil.copytree(folders[kind][0], tmp_path / "merged")
    save_file(merged, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    options = {"experts_implementation": "eager"} if kind == "experts" else {}
    exact, base = (
        transformers_logprobs(folder, BATCH, dtype=torch.float32, **options)
        for folder in (tmp_path / "merged", folders[kind][0])
    )
    assert (exact - base).abs().max() > 0.1
    torch.testing.assert_close(logprobs, exact, rtol=0, atol=BOUNDS[kind])


@pytest.mark.gpu(2)
@pytest.mark.parametrize("layout", ["TP 2", "PP 2"])
@pytest.mark.parametrize("kind", BOUNDS)
def test_two_ranks_have_the_gradient_of_one(lab, alone, folders, kind, layout):
    logprobs, gradient, merged = alone(kind)
    folder, adapter = folders[kind]
    config = config_of(folder, {"path": str(adapter)}, layout, experts=kind == "experts")
    policy = lab.policy(config)
    torch.testing.assert_close(
        policy.compute_logprobs(BATCH)[0], logprobs, rtol=0, atol=BOUNDS[kind]
    )
    again = policy.call("adapter_gradient", BATCH, "sft")[0]
    assert again.keys() == gradient.keys()
    for name, tensor in again.items():
        difference = (tensor - gradient[name]).norm()
        assert difference <= 1e-3 * gradient[name].norm() + 1e-6, name
    tensors = policy.call("merged")[0]
    assert all((tensors[name] - tensor).abs().max() < 1e-6 for name, tensor in merged.items())


@pytest.mark.gpu(1)
@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_updates_in_bfloat16_leave_the_base_bit_equal(lab, folders, kind, recompute):
    folder, _ = folders[kind]
    lora = LORA | {"dropout": 0.1, "modules_to_save": ["model.norm"]}
    options = {"use_distributed_optimizer": True, "recompute": recompute, "lr": 1e-3}
    policy = lab.policy(config_of(folder, lora, dtype="bfloat16", **options))
    before = policy.call("adapters")[0]
    train(policy, BATCH, 3)
    after = policy.call("adapters")[0]
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    read, tensors = load_file(folder / "model.safetensors"), exported(policy)
    for name, tensor in tensors.items():
        if name != "model.norm.weight":
            assert torch.equal(tensor, read[name].bfloat16()), name
    trained, in_buffers, in_states = policy.call("trained")[0]
    assert trained == in_buffers == in_states
