"""Adapters in pipelines of uneven stages and of several chunks a rank."""

import pytest
import torch
from lora_cases import base_model, peft_gradient, peft_model, save_peft_adapter
from pipeline_cases import NUM_LAYERS, ONE_RANK, PIPELINES
from policy_cases import exported, padded_logprobs, policy_config, random_batch, save_policy_model
from safetensors.torch import load_file

from rlsys.weight_sync.connection import whole_tensors

pytestmark = [pytest.mark.system, pytest.mark.slow]

UPDATES = {"global_batch_size": 4, "adam_eps": 1e-5, "lr": 1e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folders of a model of five layers and of its adapter, made by PEFT."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_policy_model(folder / "model", "qwen3-untied", num_layers=NUM_LAYERS)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    save_peft_adapter(folder / "model", folder / "adapter", **settings)
    return folder / "model", folder / "adapter"


@pytest.fixture(scope="module")
def one_rank(lab, model):
    """Metrics of two updates, the adapter after them, and the merged weights."""
    return updated(lab.policy(lora_config(model, **ONE_RANK, **UPDATES)))


def lora_config(model, **policy):
    folder, adapter = model
    policy["overlap_param_gather"] = None  # adapters are never gathered behind a forward pass
    return policy_config(folder, lora={"path": str(adapter)}, **policy)


def updated(policy):
    metrics = [policy.update(random_batch(step)).metrics for step in (1, 2)]
    return metrics, policy.call("adapters")[0], policy.call("merged")[0]


def assert_close(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", PIPELINES)
def test_logprobs_and_gradient_are_those_of_peft(lab, model, name):
    batch = random_batch()
    # Sharded optimizers leave each rank with the sum of its own part of the gradient only.
    plain = PIPELINES[name] | {"use_distributed_optimizer": False}
    policy = lab.policy(lora_config(model, **plain))
    with torch.no_grad():
        expected = padded_logprobs(peft_model(*model), batch)
        of_base = padded_logprobs(base_model(model[0]), batch)
    torch.testing.assert_close(policy.compute_logprobs(batch)[0], expected, rtol=0, atol=2e-5)
    # The reference of GRPO is the policy with its adapter off.
    for rows, (logprobs, _) in filter(None, policy.call("base_logprobs", batch)):
        found = logprobs * batch.completion_mask[rows]
        torch.testing.assert_close(found, of_base[rows], rtol=0, atol=2e-5)
    gradient = policy.call("adapter_gradient", batch, "sft")[0]
    expected = peft_gradient(*model, batch)
    assert gradient.keys() == expected.keys()
    for key, tensor in gradient.items():
        assert (tensor - expected[key]).norm() <= 1e-4 * expected[key].norm() + 1e-7, key


DATA_PARALLEL = {"world_size": 2, "overlap_grad_reduce": True}
"""Several optimizer steps between two weight syncs, as UPDATES has: each reads what the one before
left on both ranks."""


@pytest.mark.parametrize("name", [*PIPELINES, "DP 2"])
def test_updates_are_those_of_one_rank_and_engines_get_them(lab, model, one_rank, name):
    layout = (PIPELINES | {"DP 2": DATA_PARALLEL})[name]
    policy = lab.policy(lora_config(model, **layout, **UPDATES))
    metrics, adapter, merged = updated(policy)
    for update, expected in zip(metrics, one_rank[0], strict=True):
        assert update == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert_close(adapter, one_rank[1])
    assert_close(merged, one_rank[2])
    stored = load_file(model[0] / "model.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in exported(policy).items())
    for content, held, metadata in (
        ("adapter", adapter, policy.adapter_metadata()),
        ("weights", merged, policy.weight_metadata()),
    ):
        slices = whole_tensors(metadata)
        policy.call("plan_buckets", 20_000, slices, 0, content)
        sent = policy.call("in_buckets")[0]
        assert sent.keys() == held.keys()
        assert all(torch.equal(sent[key], held[key]) for key in held)


@pytest.mark.parametrize(
    ("first", "second"), [("VPP 2 x PP 2", "one rank"), ("one rank", "VPP 3 x PP 2, loss alone")]
)
def test_checkpoints_move_between_layouts(lab, model, tmp_path, first, second):
    layouts = PIPELINES | {"one rank": ONE_RANK}
    policy = lab.policy(lora_config(model, **layouts[first], **UPDATES))
    policy.update(random_batch(1))
    (tmp_path / "step-1").mkdir()
    policy.save_checkpoint(tmp_path / "step-1")
    policy.update(random_batch(2))
    expected = policy.call("adapters")[0]
    policy = lab.policy(lora_config(model, **layouts[second], **UPDATES))
    policy.load_checkpoint(tmp_path / "step-1")
    policy.update(random_batch(2))
    assert_close(policy.call("adapters")[0], expected)
