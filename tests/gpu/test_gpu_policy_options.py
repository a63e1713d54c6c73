"""Recompute, overlapped communication and context parallelism on GPUs change no number."""

from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE, gpu_config, long_batch
from gpu_lab import keep_gpu_busy, train
from policy_cases import LAYOUTS, exported

pytestmark = pytest.mark.gpu(1)

BATCH = long_batch(16, 400)
NUM_UPDATES = 3


def use_separate_weight_gradients(rank):
    """Do as if Transformer Engine did not add gradients to main_grad itself."""
    for module in rank.engine.model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = False


@pytest.fixture(scope="module")
def trained(lab, gpu_models):
    """Log-probs at the start, and (loss, gradient norm) of every update in two micro-batches."""

    def start_and_train(*, dtype="float32", change=None, **options):
        config = gpu_config(
            gpu_models["qwen3-tied", 0], dtype=dtype, max_tokens_per_micro_batch=1024, **options
        )
        policy = lab.policy(config)
        if change is not None:
            policy.call("run", change)
        return train(policy, BATCH, NUM_UPDATES)

    return start_and_train


@pytest.fixture(scope="module")
def usual(trained):
    return trained()


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "full"},
        {"recompute": "selective", "recompute_modules": ["mlp", "core_attn"]},
        {"recompute_logits": False},
        {"change": use_separate_weight_gradients},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_how_gradients_are_computed_changes_no_number(trained, usual, options):
    _, updates = trained(**options)
    for update, expected in zip(updates, usual[1], strict=True):
        assert update == pytest.approx(expected, rel=1e-4)
    assert len({loss for loss, _ in updates}) == NUM_UPDATES


@pytest.mark.gpu(2)
def test_context_parallel_gpus_train_as_one_does(trained):
    """In bfloat16: there are no such attention kernels in float32."""
    logprobs, updates = trained(dtype="bfloat16", **LAYOUTS["CP 2"])
    expected_logprobs, expected_updates = trained(dtype="bfloat16")
    difference = (logprobs - expected_logprobs).abs().sum() / BATCH.completion_mask.sum()
    assert difference < 1e-2
    for update, expected in zip(updates, expected_updates, strict=True):
        assert update == pytest.approx(expected, rel=2**-6)


def stale_parameters(rank):
    """Those that another gathering of weights would change."""
    before = {name: p.detach().clone() for name, p in rank.engine.model.named_parameters()}
    with torch.no_grad():
        rank.engine.ddp[0].start_param_sync(force_sync=True)
    after = dict(rank.engine.model.named_parameters())
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@pytest.mark.gpu(2)
def test_weights_are_whole_right_after_an_update_whose_gathering_overlaps(lab, gpu_models):
    """Where they are not, a weight sync would send weights of the step before, without an error."""
    options = LAYOUTS["DP 2"] | {"global_batch_size": 8, "overlap_grad_reduce": True}
    # Parts of a size that a model of 4 layers has many of.
    options |= {"megatron_kwargs": {"bucket_size": 200_000}}
    config = gpu_config(gpu_models["qwen3-tied", 0], overlap_param_gather=True, **options)
    policy = lab.policy(config)
    assert min(policy.call("num_buckets")) > 4
    batch = replace(BATCH, old_logprobs=policy.compute_logprobs(BATCH)[0])
    weights = exported(policy)
    for _ in range(NUM_UPDATES):
        policy.call("run", keep_gpu_busy)
        policy.update(batch)
        before, weights = weights, exported(policy)
        assert policy.call("run", stale_parameters) == [[], []]
        assert not all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


@pytest.mark.skipif(DEVICE == "cpu", reason="is about kernels of GPUs")
def test_float32_is_refused_where_there_are_no_kernels_for_it(lab, gpu_models):
    config = gpu_config(gpu_models["qwen3-tied", 0], dtype="float32", attention_backend="fused")
    with pytest.raises(Exception, match="has no kernels for float32"):
        lab.policy(config)
