"""Log-probs, gradients and exports of the policy on a GPU: transformers' own, but for rounding."""

import pickletools
from dataclasses import dataclass

import pytest
import torch
from gpu_cases import KINDS, gpu_config, long_batch, transformers_logprobs
from gpu_lab import use_config
from policy_cases import exported
from ray import cloudpickle
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu(1)

KINDS = [kind for kind in KINDS if kind != "qwen3-untied"]
BATCH = long_batch(12, 700)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Results:
    """[N, S] log-probs, Hugging Face tensors, and their gradients, of one model and type."""

    packed: torch.Tensor
    one_at_a_time: torch.Tensor
    exported: dict
    gradient_packed: dict
    gradient_one_at_a_time: dict


@pytest.fixture(scope="module")
def results(lab, gpu_models):
    """(kind, type) -> Results, computed when asked for."""
    known = {}

    def compute(kind, dtype):
        folder = gpu_models[kind, 0]
        options = {"num_completions": len(BATCH.lengths), "dtype": dtype}
        together = gpu_config(folder, max_tokens_per_micro_batch=4096, **options)
        alone = gpu_config(folder, micro_batch_size=1, **options)
        policy = lab.policy(together)
        packed, gradient = policy.compute_logprobs(BATCH)[0], policy.call("gradient", BATCH)[0]
        policy.call("run", use_config, alone)
        return Results(
            packed=packed,
            one_at_a_time=policy.compute_logprobs(BATCH)[0],
            exported=exported(policy),
            gradient_packed=gradient,
            gradient_one_at_a_time=policy.call("gradient", BATCH)[0],
        )

    def results(kind, dtype):
        if (kind, dtype) not in known:
            known[kind, dtype] = compute(kind, dtype)
        return known[kind, dtype]

    return results


@pytest.fixture(scope="module")
def hf(gpu_models):
    """[N, S] log-probs of transformers by (kind, type, attention)."""
    return {
        (kind, dtype, attention): transformers_logprobs(
            gpu_models[kind, 0], BATCH, dtype=DTYPES[dtype], attention=attention
        )
        for kind in KINDS
        for dtype, attention in (("float32", "sdpa"), ("bfloat16", "sdpa"), ("bfloat16", "eager"))
    }


def mean_difference(a, b):
    return ((a - b).abs().sum() / BATCH.completion_mask.sum()).item()


def relative_difference(a, b):
    """Norm of the difference of two gradients over the norm."""
    assert a.keys() == b.keys()
    squares = [((a[name] - b[name]).double() ** 2).sum() for name in a]
    norms = [(b[name].double() ** 2).sum() for name in b]
    return (sum(squares) / sum(norms)).sqrt().item()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logprobs_are_as_exact_as_those_of_transformers(results, hf, kind):
    ours, exact = results(kind, "bfloat16").packed, hf[kind, "float32", "sdpa"]
    theirs = [hf[kind, "bfloat16", attention] for attention in ("sdpa", "eager")]
    rounding = max(mean_difference(logprobs, exact) for logprobs in theirs)
    assert rounding > 1e-5  # or there is nothing to compare with
    assert mean_difference(ours, exact) < 1.25 * rounding
    assert min(mean_difference(ours, logprobs) for logprobs in theirs) < 1.25 * rounding


@pytest.mark.parametrize("kind", KINDS)
def test_float32_logprobs_equal_those_of_transformers(results, hf, kind):
    ours = results(kind, "float32").packed
    torch.testing.assert_close(ours, hf[kind, "float32", "sdpa"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_no_logprob_beyond_rounding(results, hf, kind):
    rounding = mean_difference(hf[kind, "bfloat16", "sdpa"], hf[kind, "float32", "sdpa"])
    in_bfloat16, in_float32 = results(kind, "bfloat16"), results(kind, "float32")
    difference = mean_difference(in_bfloat16.packed, in_bfloat16.one_at_a_time)
    assert difference < 0.25 * rounding
    torch.testing.assert_close(in_float32.packed, in_float32.one_at_a_time, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_packed_batch_is_that_of_its_sequences_one_at_a_time(results, kind):
    narrow, wide = results(kind, "bfloat16"), results(kind, "float32")
    rounding = relative_difference(narrow.gradient_one_at_a_time, wide.gradient_one_at_a_time)
    assert 1e-5 < rounding < 0.1
    assert relative_difference(wide.gradient_packed, wide.gradient_one_at_a_time) < 1e-4
    assert relative_difference(narrow.gradient_packed, narrow.gradient_one_at_a_time) < rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_exported_weights_are_those_that_were_read_bit_for_bit(results, gpu_models, kind, dtype):
    read = load_file(gpu_models[kind, 0] / "model.safetensors")
    ours = results(kind, dtype).exported
    assert ours.keys() == read.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, read[name].to(DTYPES[dtype])), name


def texts_in_pickle(rank):
    """Names of modules are among them."""
    pickled = cloudpickle.dumps(rank.compute_logprobs(BATCH), protocol=5)
    return {argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)}


def test_a_driver_reads_logprobs_without_megatron(lab, gpu_models):
    policy = lab.policy(gpu_config(gpu_models["qwen3-tied", 0], num_completions=len(BATCH.lengths)))
    (texts,) = policy.call("run", texts_in_pickle)
    assert "torch._utils" in texts
    assert not [text for text in texts if text.startswith(("megatron", "transformer_engine"))]
