"""Uneven pipeline stages and virtual pipeline: the same numbers as on one rank."""

import pytest
import torch
from pipeline_cases import NUM_LAYERS, ONE_RANK, PIPELINES
from policy_cases import (
    exported,
    off_policy_batch,
    padded_logprobs,
    policy_config,
    random_batch,
    save_policy_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.system

SLOW = ("VPP 3 x PP 2, loss alone", "VPP 2 x PP 2 x TP 2", "VPP 2 x PP 2 x DP 2")
MARKED = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PIPELINES]


@pytest.fixture(
    scope="module",
    params=["qwen3-tied", pytest.param("qwen2-untied", marks=pytest.mark.slow)],
)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / request.param
    save_policy_model(folder, request.param, num_layers=NUM_LAYERS)
    return folder


@pytest.fixture(scope="module")
def batch(model):
    """A batch with log-probs around the model's own, and transformers' log-probs."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logprobs = padded_logprobs(plain, random_batch())
    return off_policy_batch(logprobs), logprobs


@pytest.fixture(scope="module")
def one_rank(lab, model, batch):
    """The gradient of an update, metrics of two updates and the weights after them."""
    return results(lab, model, batch[0], **ONE_RANK)


def results(lab, folder, batch, **layout):
    # Sharded optimizers leave each rank with the sum of its own part of the gradient only.
    plain = {"use_distributed_optimizer": False, "overlap_param_gather": None}
    gradient = lab.policy(policy_config(folder, **layout | plain)).call("gradient", batch)[0]
    # Adam moves an element whose gradient is rounding, as of a bias of keys, by lr either way.
    options = {"global_batch_size": 4, "max_grad_norm": 0.5, "adam_eps": 1e-5}
    policy = lab.policy(policy_config(folder, **options, **layout))
    metrics = [policy.update(batch).metrics for _ in range(2)]
    return gradient, metrics, exported(policy)


@pytest.mark.parametrize("name", MARKED)
def test_weights_are_read_sent_and_written_bit_by_bit(lab, model, batch, name):
    policy = lab.policy(policy_config(model, **PIPELINES[name]))
    logprobs = policy.compute_logprobs(random_batch())[0]
    torch.testing.assert_close(logprobs, batch[1], rtol=0, atol=1e-5)
    read = load_file(model / "model.safetensors")
    written = exported(policy)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[key], read[key]) for key in read)
    policy.update(batch[0])
    updated = exported(policy)
    assert not torch.equal(updated["model.norm.weight"], read["model.norm.weight"])
    for sender in (0, policy.config.policy.world_size - 1):
        policy.call("plan_buckets", 20_000, None, sender)
        sent = policy.call("in_buckets")[sender]
        assert sent.keys() == updated.keys()
        assert all(torch.equal(sent[key], updated[key]) for key in updated)


@pytest.mark.parametrize("name", MARKED)
def test_updates_are_those_of_one_rank(lab, model, batch, one_rank, name):
    gradient, metrics, weights = results(lab, model, batch[0], **PIPELINES[name])
    expected_gradient, expected_metrics, expected_weights = one_rank
    for key, expected in expected_gradient.items():
        assert (gradient[key] - expected).norm() <= 1e-4 * expected.norm(), key
    for update, expected in zip(metrics, expected_metrics, strict=True):
        assert update == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for key, expected in expected_weights.items():
        torch.testing.assert_close(weights[key], expected, rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("VPP 2 x PP 2", "VPP 2 x PP 2"),
        ("VPP 2 x PP 2", "one rank"),
        pytest.param("one rank", "VPP 2 x PP 2", marks=pytest.mark.slow),
        pytest.param("uneven", "VPP 2 x PP 2 x DP 2", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_move_between_layouts(lab, tmp_path_factory, tmp_path, first, second):
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    save_policy_model(folder, "qwen3-tied", num_layers=NUM_LAYERS)
    layouts = PIPELINES | {"one rank": ONE_RANK}
    policy = lab.policy(policy_config(folder, **layouts[first]))
    policy.update(random_batch(1))
    (tmp_path / "step-1").mkdir()
    policy.save_checkpoint(tmp_path / "step-1")
    policy.update(random_batch(2))
    weights = exported(policy)
    policy = lab.policy(policy_config(folder, **layouts[second]))
    policy.load_checkpoint(tmp_path / "step-1")
    policy.update(random_batch(2))
    for key, tensor in exported(policy).items():
        if first == second:
            assert torch.equal(tensor, weights[key]), key
        torch.testing.assert_close(tensor, weights[key], rtol=0, atol=1e-5, msg=key)
