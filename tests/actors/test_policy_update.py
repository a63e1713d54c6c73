"""One update: the gradient of the equation, whatever the layout and however it is split."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from loss_oracle import oracle_loss
from policy_cases import (
    LAYOUTS,
    exported,
    off_policy_batch,
    padded_entropies,
    padded_logprobs,
    policy_config,
    random_batch,
)
from transformers import AutoModelForCausalLM

from rlsys.algo.batching import micro_batches, shard_rows
from rlsys.types import TrainBatch

pytestmark = pytest.mark.system

FOUR_RANKS = partial(pytest.param, marks=pytest.mark.slow)
"""On a machine of two cores."""

GRPO = {"beta": 0.04, "epsilon": 0.1, "epsilon_high": 0.15}
MAX_GRAD_NORM = 0.1


def logprobs_of_transformers(folder, batch, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, padded_logprobs(model, batch)


def logprobs_and_entropies_of_transformers(folder, batch):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model, padded_logprobs(model, batch), padded_entropies(model, batch)


@pytest.fixture(scope="module")
def batches(policy_models):
    """Off-policy batches, by model."""
    with torch.no_grad():
        return {
            name: off_policy_batch(logprobs_of_transformers(folder, random_batch())[1])
            for name, folder in policy_models.items()
        }


def oracle_gradient(folder, batch, grpo):
    """By tensor name, in float64: the equation as the papers have it, completion by completion."""
    model, logprobs, entropies = logprobs_and_entropies_of_transformers(folder, batch)
    loss = oracle_loss(
        grpo.loss_type,
        batch,
        logprobs,
        entropies,
        range(len(batch.lengths)),
        grpo,
        aggregation=grpo.loss_settings.loss_aggregation,
        max_completion_length=24,
    )
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "layout", "grpo", "splitting"),
    [
        ("llama-tied", "one rank", {}, {}),
        ("llama-untied", "TP 2", {"loss_type": "dapo", "entropy_coef": 0.3}, {}),
        ("qwen2-tied", "TP 2 x PP 2", {"loss_type": "gspo"}, {"max_tokens_per_micro_batch": 40}),
        ("qwen2-untied", "DP 2", {"loss_type": "dr_grpo"}, {"micro_batch_size": 1}),
        (
            "qwen3-tied",
            "PP 2",
            {"loss_type": "sapo", "epsilon_high": None, "kl_estimator": "k2"},
            {"micro_batch_size": 2},
        ),
        ("qwen3-tied", "TP 2 x DP 2", {"rollout_is": "sequence", "rollout_rs": "token"}, {}),
        (
            "qwen3-untied",
            "PP 2 x DP 2",
            {"loss_type": "cispo", "entropy_coef": 0.3},
            {"max_tokens_per_micro_batch": 32},
        ),
        ("qwen2-untied", "TP 2 x CP 2", {"loss_type": "gspo", "entropy_coef": 0.3}, {}),
        ("qwen3-untied", "TP 2", {"use_bias_correction_kl": True}, {"recompute": "full"}),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_plain_transformers(
    lab, policy_models, batches, name, layout, grpo, splitting
):
    batch = batches[name]
    # Sharded optimizers leave each rank with the sum of its own part of the gradient only.
    options = LAYOUTS[layout] | splitting | {"use_distributed_optimizer": False}
    config = policy_config(policy_models[name], grpo=GRPO | grpo, **options)
    gradient = lab.policy(config).call("gradient", batch)[0]
    expected = oracle_gradient(policy_models[name], batch, config.grpo)
    assert gradient.keys() == expected.keys()
    assert norm(expected) > 0.1
    differences = {key: gradient[key] - expected[key] for key in expected}
    assert norm(differences) <= 1e-5 * norm(expected)
    for key, difference in differences.items():
        assert difference.norm() <= 1e-4 * expected[key].norm(), key


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum() for tensor in tensors.values()))


def train(lab, folder, batch, **policy):
    """Metrics of three updates of two optimizer steps each, and the weights after them."""
    config = policy_config(
        folder, grpo=GRPO, global_batch_size=4, max_grad_norm=MAX_GRAD_NORM, **policy
    )
    policy = lab.policy(config)
    metrics = [policy.update(batch).metrics for _ in range(3)]
    return metrics, exported(policy)


@pytest.fixture(scope="module")
def one_rank(lab, policy_models, batches):
    folder, batch = policy_models["qwen3-tied"], batches["qwen3-tied"]
    return train(lab, folder, batch)


@pytest.mark.parametrize(
    "options",
    [
        LAYOUTS["TP 2"],
        LAYOUTS["PP 2"],
        LAYOUTS["CP 2"] | {"recompute": "full"},
        FOUR_RANKS(LAYOUTS["PP 2 x CP 2"]),
        FOUR_RANKS(
            LAYOUTS["CP 2 x DP 2"] | {"max_tokens_per_micro_batch": 34, "overlap_grad_reduce": True}
        ),
        LAYOUTS["DP 2"],
        LAYOUTS["DP 2"] | {"use_distributed_optimizer": False},
        LAYOUTS["DP 2"] | {"max_tokens_per_micro_batch": 34},
        FOUR_RANKS(LAYOUTS["TP 2 x PP 2"]),
        LAYOUTS["TP 2 x DP 2"],
        {"use_distributed_optimizer": False},
        {"recompute": "full"},
        {"recompute": "selective", "recompute_modules": ["mlp", "core_attn"]},
        {"recompute_logits": False},
        {"micro_batch_size": 1},
        {"micro_batch_size": 8},
        {"max_tokens_per_micro_batch": 60},
    ],
    ids=str,
)
def test_updates_do_not_depend_on_layout_and_splitting(
    lab, policy_models, batches, one_rank, options
):
    batch = batches["qwen3-tied"]
    metrics, weights = train(lab, policy_models["qwen3-tied"], batch, **options)
    expected_metrics, expected_weights = one_rank
    for update, expected in zip(metrics, expected_metrics, strict=True):
        assert update == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", ["DP 2", FOUR_RANKS("PP 2 x DP 2")])
def test_overlapping_communication_changes_no_bit(lab, policy_models, batches, layout):
    """Weights and log-probs right after an update, whose weights ranks only have in part until they
    are gathered: what is still missing would go to the rollout engines as it was before.
    """
    folder, batch = policy_models["qwen3-tied"], batches["qwen3-tied"]
    results = []
    for grad_reduce, param_gather in ((False, False), (True, False), (True, True)):
        config = policy_config(
            folder,
            grpo=GRPO,
            global_batch_size=4,
            # Norms are summed in another order where gradients are cut: so nothing is clipped.
            max_grad_norm=1e6,
            overlap_grad_reduce=grad_reduce,
            overlap_param_gather=param_gather,
            megatron_kwargs={"bucket_size": 5000},  # parts, as a large model has
            **LAYOUTS[layout],
        )
        policy = lab.policy(config)
        seen = []
        for _ in range(3):
            policy.update(batch)
            seen += [*exported(policy).items(), ("logprobs", policy.compute_logprobs(batch)[0])]
        results.append(seen)
    assert max(policy.call("num_buckets")) > 2
    plain, *overlapped = results
    for seen in overlapped:
        for (name, expected), (same_name, value) in zip(plain, seen, strict=True):
            assert name == same_name
            assert torch.equal(value, expected), name
    per_update = len(plain) // 3
    for (name, first), (_, last) in zip(plain[:per_update], plain[-per_update:], strict=True):
        assert not torch.equal(first, last), name


def test_the_updates_above_have_everything_that_could_go_wrong(policy_models, batches, one_rank):
    metrics, weights = one_rank
    assert all(update["grad_norm"] > 2 * MAX_GRAD_NORM for update in metrics)  # so it is clipped
    assert metrics[0]["clip_ratio/low_mean"] > 0
    assert metrics[0]["clip_ratio/high_mean"] > 0
    assert metrics[0]["kl"] > 0.01
    before = AutoModelForCausalLM.from_pretrained(policy_models["qwen3-tied"]).state_dict()
    assert all((tensor - before[name]).abs().max() > 1e-3 for name, tensor in weights.items())
    # One data-parallel rank has more micro-batches than the other.
    lengths = batches["qwen3-tied"].lengths
    shards = shard_rows(range(4), lengths, num_shards=2)
    counts = {len(micro_batches(s, lengths, micro_batch_size=3, max_tokens=34)) for s in shards}
    assert len(counts) == 2


def test_one_optimizer_step_a_rollout_is_on_policy(lab, policy_models):
    config = policy_config(policy_models["qwen2-tied"], grpo=GRPO, **LAYOUTS["DP 2"])
    policy = lab.policy(config)
    batch = random_batch()
    batch.ref_logprobs = batch.rollout_logprobs = policy.compute_logprobs(batch)[0]
    output = policy.update(batch)
    assert (output.policy_version, policy.policy_version) == (1, 1)
    metrics = output.metrics
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-10)
    assert metrics["sampling/logp_difference/max"] == pytest.approx(0, abs=1e-5)
    assert metrics["num_loss_tokens"] == batch.completion_mask.sum()
    assert policy.update(batch).metrics["kl"] > 1e-6


def test_only_tokens_of_high_entropy_are_trained_on(lab, policy_models, batches):
    batch, folder = replace(batches["qwen3-tied"]), policy_models["qwen3-tied"]
    options = LAYOUTS["TP 2 x DP 2"] | {"use_distributed_optimizer": False}
    grpo = GRPO | {"beta": 0.0, "top_entropy_quantile": 0.25}
    policy = lab.policy(policy_config(folder, grpo=grpo, **options))
    _, batch.entropies = policy.compute_logprobs(batch)
    *_, entropies = logprobs_and_entropies_of_transformers(folder, batch)
    torch.testing.assert_close(batch.entropies.double(), entropies, rtol=1e-4, atol=1e-4)
    mask = batch.completion_mask
    threshold = torch.quantile(entropies[mask], 0.75)
    chosen = replace(batch, advantages=batch.advantages * (entropies >= threshold))
    gradient = policy.call("gradient", batch)[0]
    config = policy_config(folder, grpo=grpo, **options)
    expected = oracle_gradient(folder, chosen, config.grpo)
    assert norm(expected) > 0.01
    difference = {key: gradient[key] - expected[key] for key in expected}
    assert norm(difference) <= 1e-5 * norm(expected)


@pytest.mark.parametrize(
    "grpo",
    [
        {"loss_type": "clip_cov", "clip_cov_ratio": 0.1, "clip_cov_lb": 0},
        {"loss_type": "kl_cov", "kl_cov_ratio": 0.1},
    ],
    ids=["clip_cov", "kl_cov"],
)
def test_tokens_of_high_covariance_are_chosen_before_the_step_is_split(
    lab, policy_models, batches, grpo
):
    batch = batches["qwen3-tied"]
    metrics = [
        lab.policy(policy_config(policy_models["qwen3-tied"], grpo=grpo, **options))
        .update(batch)
        .metrics
        for options in (LAYOUTS["one rank"], LAYOUTS["DP 2"] | {"micro_batch_size": 1})
    ]
    tokens = int(batch.completion_mask.sum())
    assert metrics[0]["clip_ratio/cov_mean"] == pytest.approx(int(0.1 * tokens) / tokens)
    for key in ("clip_ratio/cov_mean", "loss", "grad_norm"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], rel=1e-4)


def test_dropped_completions_leave_no_trace_and_a_step_of_nothing_else_is_left_out(
    lab, policy_models, batches
):
    """Rows 0 to 3 are dropped: without them, and with two optimizer steps, one is left."""
    whole = batches["qwen3-tied"]
    kept = torch.arange(8) >= 4
    dropped = replace(
        whole,
        kept=kept,
        completion_mask=whole.completion_mask & kept[:, None],
        advantages=whole.advantages * kept[:, None],
    )
    folder, options = policy_models["qwen3-tied"], LAYOUTS["DP 2"]
    policy = lab.policy(policy_config(folder, grpo=GRPO, **options))
    metrics = policy.update(dropped).metrics
    alone = TrainBatch(
        **{
            name: value[kept]
            for name in TrainBatch.__slots__
            if (value := getattr(whole, name)) is not None
        }
    )
    config = policy_config(folder, grpo=GRPO, global_batch_size=4, **options)
    policy = lab.policy(config)
    assert metrics == pytest.approx(policy.update(alone).metrics, rel=1e-5, abs=1e-6)
    nothing = replace(dropped, completion_mask=torch.zeros_like(dropped.completion_mask))
    before = exported(policy)
    assert policy.update(nothing).metrics == {"num_loss_tokens": 0.0}
    assert policy.policy_version == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in exported(policy).items())


def test_supervised_loss_is_the_mean_of_mean_log_likelihoods(lab, policy_models):
    policy = lab.policy(policy_config(policy_models["llama-tied"]))
    batch = random_batch()
    with torch.no_grad():
        logprobs = logprobs_of_transformers(policy_models["llama-tied"], batch)[1]
    means = logprobs.sum(1) / batch.completion_mask.sum(1)
    losses = [policy.update(batch, loss="sft").metrics["loss"] for _ in range(5)]
    assert losses[0] == pytest.approx(-means.mean().item(), rel=1e-5)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("schedule", "warmup_ratio", "min_lr", "steps_per_update"),
    [
        ("constant", 0.0, 0.0, 1),
        ("constant", 0.3, 0.0, 1),
        ("linear", 0.3, 1e-5, 2),
        ("cosine", 0.1, 0.0, 1),
    ],
)
def test_learning_rate_warms_up_and_decays(
    lab, policy_models, schedule, warmup_ratio, min_lr, steps_per_update
):
    lr, updates = 1e-4, 10
    config = policy_config(
        policy_models["qwen3-tied"],
        max_steps=updates,
        global_batch_size=8 // steps_per_update,
        lr=lr,
        min_lr=min_lr,
        lr_scheduler_type=schedule,
        warmup_ratio=warmup_ratio,
    )
    policy = lab.policy(config)
    batch = random_batch()
    batch.old_logprobs = batch.rollout_logprobs
    # The rate of the last optimizer step of each update.
    rates = [policy.update(batch).metrics["learning_rate"] for _ in range(updates)]
    warmup_steps = math.ceil(warmup_ratio * updates * steps_per_update)
    for step, rate in enumerate(rates[: warmup_steps // steps_per_update], 1):
        assert rate == pytest.approx(lr * step * steps_per_update / warmup_steps)
    after_warmup = rates[warmup_steps // steps_per_update :]
    if schedule == "constant":
        assert set(after_warmup) == {lr}
    else:
        assert after_warmup == sorted(after_warmup, reverse=True)
        assert after_warmup[0] > 0.75 * lr
        assert min_lr < rates[-1] < min_lr + 0.15 * lr
