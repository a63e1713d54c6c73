"""Preference losses in the engine on one rank: however pairs are cut, the step is the same."""

import pytest
import torch
from one_rank import one_rank, preference_step
from policy_cases import save_policy_model
from preference_cases import SECTIONS, config_of, loss_of_transformers, make_batch, norm
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.system

CUTS = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 4},
    {"max_tokens_per_micro_batch": 64},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_policy_model(folder, "qwen2-tied")
    return folder


@pytest.fixture(scope="module")
def step(folder):
    with one_rank() as executor:
        yield lambda name, options: executor.submit(
            preference_step, folder, SECTIONS[name], options
        ).result()


@pytest.mark.parametrize("name", SECTIONS)
def test_the_step_is_that_of_transformers_however_it_is_cut(step, folder, name):
    whole, metrics, _ = step(name, {})
    config = config_of(folder, SECTIONS[name])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    loss = loss_of_transformers(model, make_batch(config), config.preference)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    expected = norm({n: parameter.grad for n, parameter in model.named_parameters()})
    assert metrics["grad_norm"] == pytest.approx(expected, rel=1e-5)
    for options in CUTS:
        parts, of_parts, _ = step(name, options)
        difference = {key: parts[key] - whole[key] for key in whole}
        assert norm(difference) <= 1e-6 * norm(whole), options
        assert of_parts.keys() == metrics.keys()
        for key, value in metrics.items():
            assert of_parts[key] == pytest.approx(value, rel=1e-5, abs=1e-7), (options, key)


def test_rewards_are_means_over_answers(step, folder):
    _, metrics, logprobs = step("DPO", {"micro_batch_size": 1})
    config = config_of(folder, SECTIONS["DPO"])
    batch = make_batch(config)
    rewards = 0.1 * (logprobs.double().sum(dim=1) - batch.ref_logps)
    chosen, rejected = rewards[0::2], rewards[1::2]
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": logprobs[0::2].sum(dim=1).mean(),
        "logps/rejected": logprobs[1::2].sum(dim=1).mean(),
        "num_loss_tokens": batch.completion_mask.sum(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    assert 0 < metrics["rewards/accuracies"] < 1
