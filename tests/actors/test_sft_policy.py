"""Supervised training in the engine: transformers' loss and gradient, however it is cut."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from policy_cases import LAYOUTS, VOCAB_SIZE
from transformers import AutoModelForCausalLM

from rlsys.algo.batching import build_sample_batch
from rlsys.algo.evaluation import prediction_metrics
from rlsys.config import SftConfig
from rlsys.types import Sample

pytestmark = pytest.mark.system

FOUR_RANKS = partial(pytest.param, marks=pytest.mark.slow)


def make_samples(seed=0):
    """8 conversations of 4 to 40 tokens, whose answers are one to three pieces of them."""
    rng = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate((40, 4, 17, 9, 31, 12, 25, 6)):
        mask = np.zeros(length, dtype=bool)
        for start in range(1, length, 12):
            mask[start + 1 : start + 6] = True
        ids = rng.integers(2, VOCAB_SIZE, length).astype(np.int32)
        samples.append(Sample(str(number), ids, mask))
    return samples


SAMPLES = make_samples()


def config_of(folder, **policy):
    return SftConfig.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 8,
            "data": {"dataset": ["unused"], "max_length": 40},
            "model": {"path": str(folder)},
            # Sharded optimizers leave each rank with the sum of its part of the gradient only.
            "policy": {
                "global_batch_size": 8,
                "micro_batch_size": 3,
                "use_distributed_optimizer": False,
                **policy,
            },
        }
    )


def loss_of_transformers(model, samples):
    """transformers' own loss, sample by sample: the mean over all tokens that are trained on."""
    total = 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids).long()
        labels = ids.masked_fill(~torch.from_numpy(sample.target_mask), -100)
        total = total + model(ids[None], labels=labels[None]).loss * sample.num_targets
    return total / sum(sample.num_targets for sample in samples)


@pytest.mark.parametrize(
    ("name", "layout", "cut"),
    [
        ("qwen2-tied", "one rank", {}),
        ("llama-untied", "one rank", {"max_tokens_per_micro_batch": 64}),
        ("qwen3-tied", "TP 2", {"micro_batch_size": 1}),
        ("qwen2-untied", "DP 2", {"max_tokens_per_micro_batch": 48}),
        FOUR_RANKS("qwen3-untied", "PP 2", {"micro_batch_size": 2}),
        FOUR_RANKS("llama-tied", "CP 2", {}),
        FOUR_RANKS("qwen3-tied", "TP 2 x PP 2", {"max_tokens_per_micro_batch": 44}),
        FOUR_RANKS("qwen2-tied", "PP 2 x DP 2", {"micro_batch_size": 1}),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_transformers(lab, policy_models, name, layout, cut):
    policy = lab.policy(config_of(policy_models[name], **LAYOUTS[layout] | cut))
    batch = build_sample_batch(SAMPLES)
    gradient = policy.call("gradient", batch)[0]
    model = AutoModelForCausalLM.from_pretrained(policy_models[name], dtype=torch.float64)
    expected_loss = loss_of_transformers(model, SAMPLES)
    expected_loss.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert gradient.keys() == expected.keys()
    assert norm(expected) > 0.1
    assert norm({key: gradient[key] - expected[key] for key in expected}) <= 1e-5 * norm(expected)

    policy = lab.policy(config_of(policy_models[name], **LAYOUTS[layout] | cut))
    evaluated = evaluate(policy, batch)
    assert evaluated["loss"] == pytest.approx(expected_loss.item(), abs=1e-5)
    assert evaluated["perplexity"] == pytest.approx(math.exp(expected_loss.item()), rel=1e-5)
    metrics = policy.update(batch).metrics
    assert metrics["loss"] == pytest.approx(expected_loss.item(), abs=1e-5)
    assert metrics["num_loss_tokens"] == sum(sample.num_targets for sample in SAMPLES)


def evaluate(policy, batch):
    return prediction_metrics([(*policy.compute_predictions(batch), batch.completion_mask)])


@pytest.mark.parametrize(
    ("name", "layout", "cut"),
    [
        ("llama-untied", "one rank", {"max_tokens_per_micro_batch": 64}),
        ("qwen3-tied", "TP 2", {}),
        ("qwen2-untied", "DP 2", {"max_tokens_per_micro_batch": 48}),
        FOUR_RANKS("qwen3-untied", "PP 2", {"micro_batch_size": 2}),
        FOUR_RANKS("llama-tied", "CP 2", {}),
    ],
    ids=str,
)
def test_mean_token_accuracy_is_that_of_transformers(lab, policy_models, name, layout, cut):
    model = AutoModelForCausalLM.from_pretrained(policy_models[name], dtype=torch.float32)
    samples = [half_predicted(model, sample) for sample in SAMPLES]
    right = 0
    for sample in samples:
        predicted = model(torch.from_numpy(sample.token_ids).long()[None]).logits[0, :-1].argmax(-1)
        is_right = predicted.numpy() == sample.token_ids[1:]
        right += int((is_right & sample.target_mask[1:]).sum())
    targets = sum(sample.num_targets for sample in samples)
    assert 0.3 < right / targets < 0.7
    policy = lab.policy(config_of(policy_models[name], **LAYOUTS[layout] | cut))
    batch = build_sample_batch(samples)
    assert evaluate(policy, batch)["mean_token_accuracy"] == right / targets
    metrics = policy.update(batch).metrics
    assert metrics["mean_token_accuracy"] == pytest.approx(right / targets, abs=1e-9)


@torch.no_grad()
def half_predicted(model, sample):
    """The sample with every second token replaced by what the model predicts."""
    ids = torch.from_numpy(sample.token_ids).long()
    for position in range(1, len(ids), 2):
        ids[position] = model(ids[None, :position]).logits[0, -1].argmax()
    return replace(sample, token_ids=ids.int().numpy())


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum() for tensor in tensors.values()))


def test_fewer_rows_than_ranks_are_evaluated_alike(lab, policy_models):
    folder = policy_models["qwen2-tied"]
    policy = lab.policy(config_of(folder, **LAYOUTS["DP 2"]))
    batch = build_sample_batch(SAMPLES[:1], at_least=2)
    found = evaluate(policy, batch)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = loss_of_transformers(model, SAMPLES[:1]).item()
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    assert found["num_loss_tokens"] == SAMPLES[0].num_targets
