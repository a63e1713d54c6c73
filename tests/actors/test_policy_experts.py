"""Mixtures of experts: log-probs, gradient and weights are those of transformers, wherever the
experts are."""

import math
from functools import partial

import pytest
import torch
from policy_cases import (
    exported,
    off_policy_batch,
    padded_logprobs,
    policy_config,
    random_batch,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlsys.algo.batching import micro_batches, shard_rows

pytestmark = pytest.mark.system

FOUR_RANKS = partial(pytest.param, marks=pytest.mark.slow)
"""On a machine of two cores."""

EP_2 = {"world_size": 2, "expert_model_parallel_size": 2}
LAYOUTS = {
    "one rank": {},
    "EP 2": EP_2,
    "TP 2 x EP 2": EP_2 | {"tensor_parallel_size": 2},
    "PP 2 x EP 2": EP_2 | {"world_size": 4, "pipeline_parallel_size": 2},
    "CP 2 x DP 2 x EP 4": {
        "world_size": 4,
        "context_parallel_size": 2,
        "expert_model_parallel_size": 4,
    },
    "TP 2 x DP 2 x EP 4": {
        "world_size": 4,
        "tensor_parallel_size": 2,
        "expert_model_parallel_size": 4,
    },
}
ONE_AND_TWO_MICRO_BATCHES = {"max_tokens_per_micro_batch": 64}
"""Micro-batches of the two data-parallel ranks, which exchange tokens in each."""


def of_transformers(folder, batch, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    return model, padded_logprobs(model, batch)


def by_expert(tensors):
    """What transformers holds of all experts in one tensor, under the names of checkpoints."""
    for name, tensor in tensors:
        if ".experts." not in name:
            yield name, tensor
            continue
        prefix, _, fused = name.rpartition(".")
        parts = ["gate_proj", "up_proj"] if fused == "gate_up_proj" else ["down_proj"]
        for expert, both in enumerate(tensor):
            for part, value in zip(parts, both.chunk(len(parts)), strict=True):
                yield f"{prefix}.{expert}.{part}.weight", value


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum() for tensor in tensors.values()))


def test_the_ranks_have_different_numbers_of_micro_batches():
    lengths = random_batch().lengths
    shards = shard_rows(range(8), lengths, num_shards=2)
    tokens = ONE_AND_TWO_MICRO_BATCHES["max_tokens_per_micro_batch"]
    counts = [len(micro_batches(s, lengths, micro_batch_size=3, max_tokens=tokens)) for s in shards]
    assert sorted(counts) == [1, 2]


@pytest.mark.parametrize(
    ("normalised", "layout", "splitting"),
    [
        (True, "one rank", {}),
        (False, "one rank", {"micro_batch_size": 1}),
        (False, "EP 2", ONE_AND_TWO_MICRO_BATCHES),
        (True, "TP 2 x EP 2", {}),
        FOUR_RANKS(True, "PP 2 x EP 2", {}),
        FOUR_RANKS(True, "CP 2 x DP 2 x EP 4", ONE_AND_TWO_MICRO_BATCHES),
    ],
)
def test_logprobs_are_those_of_transformers_and_a_round_trip_is_bit_equal(
    lab, mixtures, normalised, layout, splitting
):
    folder, batch = mixtures[normalised], random_batch()
    policy = lab.policy(policy_config(folder, **LAYOUTS[layout], **splitting))
    with torch.no_grad():
        _, expected = of_transformers(folder, batch)
    torch.testing.assert_close(policy.compute_logprobs(batch)[0], expected, rtol=0, atol=1e-5)
    tensors, saved = exported(policy), load_file(folder / "model.safetensors")
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items())
    announced = {meta.name: meta.shape for meta in policy.weight_metadata()}
    assert announced == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_these_models_are_sensitive_to_how_experts_are_weighted(mixtures):
    batch = random_batch()
    with torch.no_grad():
        model, normalised = of_transformers(mixtures[True], batch)
        for layer in model.model.layers:
            layer.mlp.gate.norm_topk_prob = False
        assert (padded_logprobs(model, batch) - normalised).abs().max() > 0.1


@pytest.mark.parametrize(
    ("layout", "splitting"),
    [
        ("EP 2", ONE_AND_TWO_MICRO_BATCHES),
        FOUR_RANKS("TP 2 x DP 2 x EP 4", {"recompute": "selective"}),
        FOUR_RANKS("CP 2 x DP 2 x EP 4", ONE_AND_TWO_MICRO_BATCHES),
    ],
)
def test_the_gradient_is_that_of_plain_transformers(lab, mixtures, layout, splitting):
    batch = random_batch()
    # Sharded optimizers leave each rank with the sum of its own part of the gradient only.
    options = LAYOUTS[layout] | splitting | {"use_distributed_optimizer": False}
    gradient = lab.policy(policy_config(mixtures[True], **options)).call("gradient", batch)[0]
    model, logprobs = of_transformers(mixtures[True], batch, dtype=torch.float64)
    means = ((logprobs - logprobs.detach()).exp() * batch.advantages).sum(1)
    (-(means / batch.completion_mask.sum(1)).mean()).backward()
    expected = dict(by_expert((n, p.grad) for n, p in model.named_parameters()))
    assert gradient.keys() == expected.keys()
    differences = {name: gradient[name] - expected[name] for name in expected}
    assert norm(differences) <= 1e-5 * norm(expected)
    router = {name: tensor for name, tensor in expected.items() if ".gate." in name}
    experts = {name: tensor for name, tensor in expected.items() if ".experts." in name}
    for part in (router, experts):
        assert norm(part) > 0.01
        assert norm({name: differences[name] for name in part}) <= 1e-5 * norm(part)


def train(lab, folder, batch, **options):
    """Metrics of three clipped updates, and the weights after them.

    Some experts see few tokens: with AdamW's usual epsilon, rounding would move their weights.
    """
    grpo = {"epsilon": 0.1, "epsilon_high": 0.15}
    options |= {"max_grad_norm": 0.1, "adam_eps": 1e-5}
    policy = lab.policy(policy_config(folder, grpo=grpo, **options))
    metrics = [policy.update(batch).metrics for _ in range(3)]
    return metrics, exported(policy)


@pytest.fixture(scope="module")
def one_rank(lab, mixtures):
    with torch.no_grad():
        batch = off_policy_batch(of_transformers(mixtures[True], random_batch())[1])
    return batch, *train(lab, mixtures[True], batch)


@pytest.mark.parametrize(
    "options",
    [
        LAYOUTS["EP 2"]
        | ONE_AND_TWO_MICRO_BATCHES
        | {"overlap_grad_reduce": True, "overlap_param_gather": True},
        FOUR_RANKS(LAYOUTS["PP 2 x EP 2"] | {"use_distributed_optimizer": False}),
        FOUR_RANKS(LAYOUTS["TP 2 x DP 2 x EP 4"]),
    ],
    ids=str,
)
def test_updates_do_not_depend_on_where_experts_are(lab, mixtures, one_rank, options):
    batch, expected_metrics, expected_weights = one_rank
    assert all(update["grad_norm"] > 0.2 for update in expected_metrics)  # so it is clipped
    metrics, weights = train(lab, mixtures[True], batch, **options)
    for update, expected in zip(metrics, expected_metrics, strict=True):
        assert update == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("layouts", "options"),
    [
        (["one rank", "EP 2", "one rank"], {}),
        (["EP 2", "one rank", "TP 2 x EP 2"], {"use_distributed_optimizer": False}),
        (["EP 2", "one rank", "EP 2"], {"dtype": "bfloat16", "use_distributed_optimizer": False}),
        FOUR_RANKS(["EP 2", "TP 2 x DP 2 x EP 4", "one rank"], {}),
        FOUR_RANKS(["one rank", "PP 2 x EP 2", "EP 2"], {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_a_run_continues_with_its_experts_elsewhere(
    lab, mixtures, one_rank, tmp_path, layouts, options
):
    """Three processes take one step each, where an undisturbed one takes three.

    AdamW's moments and its count of steps matter from the second step on. Some weights of experts
    in bfloat16 are rounded the other way.
    """
    batch, *_ = one_rank
    options = {"adam_eps": 1e-5, "weight_decay": 0.1, "lr_scheduler_type": "cosine"} | options
    bound = {"bfloat16": 2e-2}.get(options.get("dtype"), 1e-5)

    def policy_of(layout):
        return lab.policy(policy_config(mixtures[True], **options | LAYOUTS[layout]))

    undisturbed = policy_of("one rank")
    expected = [undisturbed.update(batch).metrics for _ in layouts]
    at_checkpoint, expected_weights = {}, exported(undisturbed)
    for step, (layout, metrics) in enumerate(zip(layouts, expected, strict=True)):
        policy = policy_of(layout)
        if step > 0:
            policy.load_checkpoint(tmp_path / f"step-{step}")
            assert policy.policy_version == step
            assert same(exported(policy), at_checkpoint)
        assert policy.update(batch).metrics == pytest.approx(metrics, rel=100 * bound, abs=bound)
        (tmp_path / f"step-{step + 1}").mkdir()
        policy.save_checkpoint(tmp_path / f"step-{step + 1}")
        at_checkpoint = exported(policy)
    for name, tensor in at_checkpoint.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=bound, msg=name)


def same(tensors, others):
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("layout", ["PP 2 x EP 2", FOUR_RANKS("TP 2 x DP 2 x EP 4")])
def test_buckets_hold_every_expert(lab, mixtures, layout):
    policy = lab.policy(policy_config(mixtures[True], **LAYOUTS[layout]))
    policy.call("plan_buckets", 50_000)
    expected = load_file(mixtures[True] / "model.safetensors")
    for _ in range(2):
        tensors = policy.call("in_buckets")[0]
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name
        policy.call("change_weights", False)
        expected = {name: 3 * tensor + 1 for name, tensor in expected.items()}
