"""Adapters on the policy: PEFT's numbers, whatever the layout, on a base that never changes."""

import math

import pytest
import torch
from lora_cases import (
    PREFIX,
    base_model,
    merged_gradient,
    peft_gradient,
    peft_model,
    save_peft_adapter,
)
from policy_cases import LAYOUTS, padded_logprobs, policy_config, random_batch
from random_adapter import save_random_adapter
from safetensors.torch import load_file

from rlsys.config import LoraConfig
from rlsys.weight_sync.connection import whole_tensors

pytestmark = pytest.mark.system

LORA = {"rank": 4, "alpha": 6.0}
WHOLE = ["embed_tokens", "lm_head", "norm"]
EXPERTS = {"expert_model_parallel_size": 2}
DENSE = [
    pytest.param("qwen3-tied", "one rank", {}, {}, id="one rank"),
    pytest.param("qwen2-untied", "TP 2", {}, {}, id="TP 2"),
    *(
        pytest.param(*case, id=", ".join([case[1], *case[2]]), marks=pytest.mark.slow)
        for case in (
            ("qwen3-tied", "PP 2", {}, {}),
            ("qwen3-tied", "CP 2", {}, {}),
            ("llama-untied", "DP 2", {"use_rslora": True}, {}),
            ("qwen3-untied", "TP 2 x PP 2", {"modules_to_save": WHOLE}, {}),
            ("qwen3-tied", "TP 2 x PP 2", {"modules_to_save": WHOLE}, {}),
            ("qwen3-untied", "TP 2", {"target_modules": ["k_proj", "up_proj"]}, {}),
            ("qwen3-untied", "TP 2", {"target_modules": r".*\.0\..*(gate|o)_proj"}, {}),
            ("qwen3-untied", "TP 2", {}, {"recompute": "full"}),
            ("qwen3-untied", "one rank", {"target_modules": "all-linear"}, {"recompute": "full"}),
        )
    ),
]


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum() for tensor in tensors.values()))


def assert_equal_gradients(gradient, expected):
    assert gradient.keys() == expected.keys()
    assert norm(expected) > 0.1
    differences = {key: gradient[key] - expected[key] for key in expected}
    assert norm(differences) <= 1e-5 * norm(expected)
    for key, difference in differences.items():
        # The gradient of A or B alone: a missing sum over ranks is not hidden by larger ones.
        assert difference.norm() <= 1e-4 * expected[key].norm() + 1e-7, key


@pytest.mark.parametrize(("name", "layout", "settings", "options"), DENSE)
def test_logprobs_and_gradient_of_an_adapter_are_those_of_peft(
    lab, policy_models, tmp_path, name, layout, settings, options
):
    folder, adapter, batch = policy_models[name], tmp_path / "adapter", random_batch()
    save_peft_adapter(
        folder, adapter, **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    )
    # Sharded optimizers leave each rank with the sum of its own part of the gradient only.
    options = options | LAYOUTS[layout] | {"use_distributed_optimizer": False}
    policy = lab.policy(policy_config(folder, lora={"path": str(adapter)}, **options))

    stored = load_file(adapter / "adapter_model.safetensors")
    tensors = policy.call("adapters")[0]
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in tensors.items())
    with torch.no_grad():
        expected = padded_logprobs(peft_model(folder, adapter), batch)
        of_base = padded_logprobs(base_model(folder), batch)
    assert (expected - of_base).abs().max() > 0.1
    torch.testing.assert_close(policy.compute_logprobs(batch)[0], expected, rtol=0, atol=2e-5)
    gradient = policy.call("adapter_gradient", batch, "sft")[0]
    expected = peft_gradient(folder, adapter, batch)
    if name.endswith("-tied") and "modules_to_save" in settings:
        # PEFT trains two copies of what is one tensor here.
        head, embedding = PREFIX + "lm_head.weight", PREFIX + "model.embed_tokens.weight"
        expected[head] = expected[embedding] = expected[head] + expected[embedding]
    assert_equal_gradients(gradient, expected)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one rank"),
        *(
            pytest.param(EXPERTS | LAYOUTS[layout], id=f"{layout}, EP 2", marks=pytest.mark.slow)
            for layout in ("DP 2", "TP 2", "PP 2 x DP 2", "CP 2", "CP 2 x DP 2", "TP 2 x CP 2")
        ),
    ],
)
def test_adapters_of_experts_are_those_of_peft(lab, mixtures, tmp_path, options):
    folder, adapter, batch = mixtures[True], tmp_path / "adapter", random_batch()
    lora = LoraConfig(**LORA)
    save_random_adapter(folder, adapter, lora)
    options = options | {"use_distributed_optimizer": False}
    policy = lab.policy(policy_config(folder, lora={"path": str(adapter)}, **options))
    stored, tensors = load_file(adapter / "adapter_model.safetensors"), policy.call("adapters")[0]
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in tensors.items())
    with torch.no_grad():
        expected = padded_logprobs(peft_model(folder, adapter), batch)
    torch.testing.assert_close(policy.compute_logprobs(batch)[0], expected, rtol=0, atol=2e-5)
    gradient = policy.call("adapter_gradient", batch, "sft")[0]
    assert_equal_gradients(gradient, merged_gradient(folder, adapter, batch, scale=6.0 / 4))
    merged = load_file(folder / "model.safetensors")
    for name, a in stored.items():
        if ".lora_A." in name:
            weight = name.removeprefix(PREFIX).replace(".lora_A.", ".")
            merged[weight] += 6.0 / 4 * stored[name.replace("_A.", "_B.")] @ a
    for content, expected, metadata in (
        ("adapter", stored, policy.adapter_metadata()),
        ("weights", merged, policy.weight_metadata()),
    ):
        policy.call("plan_buckets", 20_000, whole_tensors(metadata), 0, content)
        sent = policy.call("in_buckets")[0]
        assert sent.keys() == expected.keys()
        for name, tensor in sent.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)
