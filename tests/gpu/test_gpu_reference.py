"""Policy and reference on one GPU: the same numbers, and no memory while the reference waits."""

import pytest
import torch
from gpu_cases import DEVICE, gpu_config, long_batch, save_gpu_model

from rlsys.actors.reference import ReferenceActors
from rlsys.actors.waiting import get_all

pytestmark = pytest.mark.gpu(1)

BATCH = long_batch(16, 200)
MIB = 2**20
MEAN_DIFFERENCE = 2e-3
"""Nats: the error of bfloat16, as two processes may be given different kernels."""


def memory(rank):
    """(weights' bytes, are they on the GPU, bytes allocated and reserved there, peak)."""
    parameters = list(rank.engine.model.parameters())
    return (
        sum(p.numel() * p.element_size() for p in parameters),
        any(p.is_cuda for p in parameters),
        torch.cuda.memory_allocated(),
        torch.cuda.memory_reserved(),
        torch.cuda.max_memory_allocated(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that is larger than what CUDA libraries allocate for themselves."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 1536, "num_attention_heads": 12, "intermediate_size": 12288}
    save_gpu_model(folder, "qwen2-tied", **(sizes if DEVICE == "cuda" else {}))
    return folder


def test_a_reference_that_shares_the_policys_gpu_leaves_it_while_idle(lab, gpus, folder):
    config = gpu_config(folder, beta=0.1)
    assert config.reference.placement == "policy"
    reference = ReferenceActors(config, device=DEVICE, place=gpus.on(0))
    starting = reference.async_start()
    policy = lab.policy(config)
    get_all(starting, phase="start", timeout_s=120)
    (actor,) = reference.actors.values()
    for _ in range(2):  # a policy that was not updated is the reference, but for rounding
        ours, theirs = reference.compute_logprobs(BATCH)[0], policy.compute_logprobs(BATCH)[0]
        differences = (ours - theirs)[BATCH.completion_mask].abs()
        assert differences.mean() < MEAN_DIFFERENCE, differences.max()
        policy.update(BATCH)
        if DEVICE == "cuda":
            weights, on_gpu, allocated, reserved, peak = _ask(actor)
            assert weights > 300 * MIB
            assert peak > weights
            assert not on_gpu
            assert allocated < 150 * MIB
            assert reserved < 200 * MIB
        policy = lab.policy(config)
    reference.close()


def _ask(actor):
    return get_all(
        {"reference rank 0": actor.__ray_call__.remote(memory)}, phase="memory", timeout_s=60
    )[0]
