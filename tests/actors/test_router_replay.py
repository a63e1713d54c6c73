"""Router replay: the policy sends tokens to the experts that the rollout engine chose."""

from dataclasses import replace

import pytest
import torch
from policy_cases import padded_logprobs, policy_config, random_batch
from routing_oracle import random_routing, replay
from test_policy_experts import FOUR_RANKS, LAYOUTS, ONE_AND_TWO_MICRO_BATCHES, by_expert, norm
from tiny_models import save_tiny_qwen3_moe
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def batch():
    batch = random_batch()
    return replace(batch, routed_experts=random_routing(batch.lengths))


def replaying_config(folder, **policy):
    config = policy_config(folder, **policy)
    rollout = config.rollout.model_copy(update={"router_replay": True})
    return config.model_copy(update={"rollout": rollout})


def of_transformers(folder, batch, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    replay(model, batch)
    return model, padded_logprobs(model, batch)


@pytest.mark.parametrize(
    ("normalised", "layout", "splitting"),
    [
        (True, "one rank", {}),
        (False, "one rank", {"micro_batch_size": 1}),
        (False, "EP 2", ONE_AND_TWO_MICRO_BATCHES),
        (True, "TP 2 x EP 2", {}),
        (True, "PP 2", {}),
        FOUR_RANKS(True, "PP 2 x EP 2", {}),
        FOUR_RANKS(True, "CP 2 x DP 2 x EP 4", ONE_AND_TWO_MICRO_BATCHES),
    ],
)
def test_logprobs_are_those_of_the_replayed_experts(
    lab, mixtures, batch, normalised, layout, splitting
):
    layouts = LAYOUTS | {"PP 2": {"world_size": 2, "pipeline_parallel_size": 2}}
    folder = mixtures[normalised]
    policy = lab.policy(replaying_config(folder, **layouts[layout], **splitting))
    with torch.no_grad():
        _, expected = of_transformers(folder, batch)
        _, own = of_transformers(folder, replace(batch, routed_experts=None))
    assert (expected - own).abs().mean() > 0.1
    logprobs = policy.compute_logprobs(batch)[0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("EP 2", ONE_AND_TWO_MICRO_BATCHES),
        ("PP 2", {"recompute": "full", "micro_batch_size": 2}),
        ("TP 2 x EP 2", {"recompute": "selective", "micro_batch_size": 2}),
        FOUR_RANKS("PP 2 x EP 2", {"recompute": "selective", "micro_batch_size": 1}),
        FOUR_RANKS("CP 2 x DP 2 x EP 4", ONE_AND_TWO_MICRO_BATCHES),
    ],
)
def test_the_gradient_is_that_of_the_replayed_experts(lab, mixtures, batch, layout, options):
    layouts = LAYOUTS | {"PP 2": {"world_size": 2, "pipeline_parallel_size": 2}}
    options = layouts[layout] | options | {"use_distributed_optimizer": False}
    policy = lab.policy(replaying_config(mixtures[True], **options))
    gradient = policy.call("gradient", batch)[0]
    model, logprobs = of_transformers(mixtures[True], batch)
    means = ((logprobs - logprobs.detach()).exp() * batch.advantages).sum(1)
    (-(means / batch.completion_mask.sum(1)).mean()).backward()
    expected = dict(by_expert((n, p.grad) for n, p in model.named_parameters()))
    assert gradient.keys() == expected.keys()
    differences = {name: gradient[name] - expected[name] for name in expected}
    router = {name: tensor for name, tensor in expected.items() if ".gate." in name}
    assert norm(router) > 0.01  # probabilities are the policy's own, so the router learns
    assert norm({name: differences[name] for name in router}) <= 1e-5 * norm(router)
    assert norm(differences) <= 1e-5 * norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"recompute": "full"}], ids=["plain", "recompute"])
def test_virtual_pipeline_replays_in_each_stage(lab, tmp_path, options):
    save_tiny_qwen3_moe(tmp_path, seed=5, num_hidden_layers=4)
    batch = random_batch()
    batch = replace(batch, routed_experts=random_routing(batch.lengths, num_layers=4))
    stages = {"world_size": 2, "pipeline_parallel_size": 2, "pipeline_layout": "Et|t|t|tL"}
    options = stages | options | {"micro_batch_size": 2, "use_distributed_optimizer": False}
    policy = lab.policy(replaying_config(tmp_path, **options))
    model, logprobs = of_transformers(tmp_path, batch)
    torch.testing.assert_close(
        policy.compute_logprobs(batch)[0].double(), logprobs.detach(), rtol=0, atol=1e-5
    )
    gradient = policy.call("gradient", batch)[0]
    means = ((logprobs - logprobs.detach()).exp() * batch.advantages).sum(1)
    (-(means / batch.completion_mask.sum(1)).mean()).backward()
    expected = dict(by_expert((n, p.grad) for n, p in model.named_parameters()))
    assert gradient.keys() == expected.keys()
    assert norm({n: gradient[n] - expected[n] for n in expected}) <= 1e-5 * norm(expected)
