"""Preference training in the engine: transformers' gradient, on one rank and on several."""

from functools import partial

import pytest
import torch
from policy_cases import LAYOUTS
from preference_cases import SECTIONS, config_of, loss_of_transformers, make_batch, norm
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.system

SLOW = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("loss", "name", "layout", "cut"),
    [
        ("RPO", "qwen2-tied", "DP 2", {"micro_batch_size": 1}),
        ("KTO", "qwen3-tied", "TP 2", {"max_tokens_per_micro_batch": 48}),
        SLOW("DPO", "llama-untied", "TP 2", {"micro_batch_size": 2}),
        SLOW("IPO", "qwen2-untied", "DP 2", {"max_tokens_per_micro_batch": 80}),
        SLOW("SimPO", "qwen3-untied", "PP 2", {"micro_batch_size": 2}),
        SLOW("ORPO", "llama-tied", "CP 2", {"micro_batch_size": 2}),
        SLOW("CPO", "qwen3-tied", "TP 2 x DP 2", {"micro_batch_size": 1}),
        SLOW("DPO", "qwen2-tied", "PP 2 x DP 2", {"micro_batch_size": 1}),
        SLOW("KTO", "qwen2-tied", "PP 2", {"micro_batch_size": 1}),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_transformers(lab, policy_models, loss, name, layout, cut):
    config = config_of(policy_models[name], SECTIONS[loss], **LAYOUTS[layout] | cut)
    policy, batch = lab.policy(config), make_batch(config)
    gradient = policy.call("gradient", batch)[0]
    model = AutoModelForCausalLM.from_pretrained(policy_models[name], dtype=torch.float64)
    expected_loss = loss_of_transformers(model, batch, config.preference)
    expected_loss.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert gradient.keys() == expected.keys()
    assert norm(expected) > 0.01
    assert norm({key: gradient[key] - expected[key] for key in expected}) <= 1e-5 * norm(expected)
    metrics = lab.policy(config).update(batch).metrics
    assert metrics["loss"] == pytest.approx(expected_loss.item(), abs=1e-5)


@pytest.mark.slow
def test_the_reference_of_an_adapter_is_its_base(lab, policy_models):
    """The log-probs with the adapter off are the model's, before and after an update."""
    folder = policy_models["qwen2-tied"]
    lora = {"rank": 4, "target_modules": "all-linear"}
    config = config_of(folder, SECTIONS["DPO"], lora=lora, lr=1e-2)
    assert config.reference_is_base
    policy, batch = lab.policy(config), make_batch(config)
    before, _ = policy.compute_base_logprobs(batch)
    batch.ref_logps = before.double().sum(dim=1)
    metrics = policy.update(batch).metrics
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    after, _ = policy.compute_base_logprobs(batch)
    torch.testing.assert_close(after, before)
    policy.update(batch)
    assert policy.update(batch).metrics["rewards/margins"] > 0.01
