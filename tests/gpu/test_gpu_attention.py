"""policy.attention_backend takes the kernels that it names, and all of them compute the same."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from gpu_cases import DEVICE, gpu_config, long_batch, save_gpu_model, transformers_logprobs
from gpu_lab import GpuRank
from policy_cases import PolicyLab

from rlsys.model.attention import missing_attention

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(DEVICE == "cpu", reason="is about kernels of GPUs"),
]

KIND = "qwen3-tied"
BATCH = long_batch(12, 700)
INSTALLED = [kind for kind in ("fused", "unfused", "flash") if missing_attention(kind) is None]
no_flash = pytest.mark.skipif("flash" not in INSTALLED, reason="no flash-attn is installed")
BACKENDS = ["fused", "unfused", pytest.param("flash", marks=no_flash)]


def kernels_in_use(rank):
    """What Transformer Engine chose for the last attention of this process."""
    from transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention import (
        _attention_backends,
    )

    kinds = ("flash", "fused", "unfused")
    return [kind for kind in kinds if _attention_backends[f"use_{kind}_attention"]]


@dataclass
class Computed:
    """By one backend: [N, S] log-probs, gradients by name, and the kernels that ran."""

    logprobs: torch.Tensor
    gradient: dict
    kernels: list


def compute(lab, folder, **options):
    policy = lab.policy(
        gpu_config(
            folder, num_completions=len(BATCH.lengths), max_tokens_per_micro_batch=4096, **options
        )
    )
    logprobs = policy.compute_logprobs(BATCH)[0]
    gradient = policy.call("gradient", BATCH)[0]
    return Computed(logprobs, gradient, policy.call("run", kernels_in_use)[0])


def compute_in_processes(gpus, folder, backends):
    """Backend -> `Computed`, each in a process of its own: one chooses its kernels once.

    All at once, as starting takes most of the time.
    """

    def in_a_process(backend):
        lab = PolicyLab(max_ranks=1, device=DEVICE, rank_class=GpuRank, place=gpus.rank_by_rank)
        try:
            return compute(lab, folder, dtype="bfloat16", attention_backend=backend)
        finally:
            lab.close()

    with ThreadPoolExecutor() as threads:
        running = {backend: threads.submit(in_a_process, backend) for backend in backends}
    return lambda backend: running[backend].result()


@pytest.fixture(scope="module")
def computed(gpus, gpu_models):
    return compute_in_processes(gpus, gpu_models[KIND, 0], INSTALLED)


@pytest.fixture(scope="module")
def exact(lab, gpu_models):
    """In float32, where plain matrix products are the only kind there is."""
    return compute(lab, gpu_models[KIND, 0], dtype="float32")


def mean_difference(a, b):
    return ((a - b).abs().sum() / BATCH.completion_mask.sum()).item()


def relative_difference(gradient, exact):
    squares = sum(((gradient[name] - exact[name]).double() ** 2).sum() for name in exact)
    return (squares / sum((tensor.double() ** 2).sum() for tensor in exact.values())).sqrt().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernels_that_were_named_are_the_ones_that_run(computed, backend):
    assert computed(backend).kernels == [backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_as_exact_as_transformers(computed, exact, gpu_models, backend):
    theirs = transformers_logprobs(gpu_models[KIND, 0], BATCH, dtype=torch.bfloat16)
    rounding = mean_difference(theirs, exact.logprobs)
    assert rounding > 1e-5  # or there is nothing to compare with
    assert mean_difference(computed(backend).logprobs, exact.logprobs) < 1.25 * rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_the_gradient_of_plain_matrix_products(computed, exact, backend):
    rounding = relative_difference(computed("unfused").gradient, exact.gradient)
    assert 1e-5 < rounding < 0.1
    assert relative_difference(computed(backend).gradient, exact.gradient) < 1.25 * rounding


@pytest.mark.parametrize("head_dim", [192, 256])
def test_large_heads_have_the_gradient_of_plain_matrix_products(gpus, lab, tmp_path, head_dim):
    save_gpu_model(tmp_path / "model", KIND, head_dim=head_dim)
    exact = compute(lab, tmp_path / "model", dtype="float32").gradient
    computed = compute_in_processes(gpus, tmp_path / "model", ["auto", "unfused"])
    rounding = relative_difference(computed("unfused").gradient, exact)
    assert 1e-5 < rounding < 0.1
    assert relative_difference(computed("auto").gradient, exact) < 1.25 * rounding
