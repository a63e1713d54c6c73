"""The fused log-prob kernels of GPUs against the formula in float64, entropy and gradients too."""

import pytest
import torch
from gpu_cases import gpu_config
from policy_cases import LAYOUTS

from rlsys.algo.logprobs import chunked_logprobs
from rlsys.algo.sampling import Sampling, VocabSlice

pytestmark = pytest.mark.gpu(1)

SHAPES = [(1, 512), (7, 8192), (300, 16640)]
"""Tokens and vocabulary: what is compiled once is used for all of them."""
PADDING = 6
"""Last logits of every row that have no probability: not -inf, which times 0 is nan."""
TOLERANCE = {"float32": 2e-5, "bfloat16": 2**-8}
"""Error of a gradient relative to the largest of its row: its type's precision."""


def formula(logits, targets, upstream, temperature):
    """Values and gradient of `upstream * logprobs - 0.3 * entropy`, in float64."""
    logits = logits.double()[:, :-PADDING].requires_grad_()
    log_softmax = (logits / temperature).log_softmax(-1)
    logprobs = log_softmax.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    (alone,) = torch.autograd.grad((upstream * logprobs).sum(), logits, retain_graph=True)
    loss = (upstream * logprobs - 0.3 * entropy).sum()
    (with_entropy,) = torch.autograd.grad(loss, logits)
    pad = torch.nn.functional.pad
    return (
        logprobs.detach(),
        entropy.detach(),
        pad(alone, (0, PADDING)),
        pad(with_entropy, (0, PADDING)),
    )


def errors(rank, dtype, shape):
    """On a rank, of its slice of the vocabulary: largest errors by name."""
    from megatron.core import parallel_state

    device, (tokens, vocabulary) = rank.engine.device, shape
    rng = torch.Generator().manual_seed(tokens)
    logits = (4 * torch.randn(shape, generator=rng)).to(getattr(torch, dtype))
    logits[:, -PADDING:] = -1e30
    targets = torch.randint(0, vocabulary - PADDING, (tokens,), generator=rng).to(device)
    upstream = torch.randn(tokens, generator=rng).to(device)
    expected = formula(logits.to(device), targets, upstream.double(), 0.7)

    group = parallel_state.get_tensor_model_parallel_group()
    width = vocabulary // group.size()
    own = slice(group.rank() * width, (group.rank() + 1) * width)
    leaf = logits[:, own].to(device).requires_grad_()
    logprobs, entropy = chunked_logprobs(
        leaf,
        torch.eye(width, dtype=leaf.dtype, device=device),  # the product with it is exact
        targets,
        sampling=Sampling(temperature=0.7),
        vocab=VocabSlice(own.start, group if group.size() > 1 else None),
        chunk_size=1024,
    )
    (alone,) = torch.autograd.grad((upstream * logprobs).sum(), leaf, retain_graph=True)
    loss = (upstream * logprobs - 0.3 * entropy).sum()
    (with_entropy,) = torch.autograd.grad(loss, leaf)
    assert alone.dtype == leaf.dtype

    def of_gradient(ours, theirs):
        error = (ours.double() - theirs[:, own]).abs().amax(-1)
        return (error / theirs.abs().amax(-1)).max().item()

    return {
        "logprobs": (logprobs - expected[0]).abs().max().item(),
        "entropy": (entropy - expected[1]).abs().max().item(),
        "gradient": of_gradient(alone, expected[2]),
        "gradient with entropy": of_gradient(with_entropy, expected[3]),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["one rank", pytest.param("TP 2", marks=pytest.mark.gpu(2))])
def test_fused_logprobs_entropies_and_gradients_are_the_formulas(lab, gpu_models, layout, dtype):
    policy = lab.policy(gpu_config(gpu_models["qwen3-tied", 0], **LAYOUTS[layout]))
    for shape in SHAPES:
        for found in policy.call("run", errors, dtype, shape):
            assert found["logprobs"] < 2e-5, (shape, found)
            assert found["entropy"] < 1e-4, (shape, found)
            assert found["gradient"] < TOLERANCE[dtype], (shape, found)
            assert found["gradient with entropy"] < TOLERANCE[dtype], (shape, found)


def truncated(rank, dtype):
    """On a rank: largest difference to the CPU, of what top_k, top_p and the tokenizer leave."""
    from megatron.core import parallel_state

    device, (tokens, vocabulary) = rank.engine.device, (300, 4096)
    sampling = Sampling(0.6, top_k=50, top_p=0.9, num_token_ids=vocabulary - PADDING)
    rows = [
        torch.randperm(vocabulary, generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    # Exact in bfloat16, and no two of a row are equal where it matters: either might be kept.
    ranks_of_row = torch.stack(rows).float()
    logits = -(ranks_of_row / 4).clamp(max=64.0).repeat(tokens // 4, 1).to(getattr(torch, dtype))
    targets = logits[:, : vocabulary - PADDING].argmax(-1)
    group = parallel_state.get_tensor_model_parallel_group()
    width = vocabulary // group.size()
    own = slice(group.rank() * width, (group.rank() + 1) * width)
    found = {}
    for place, part, ranks in ((device, own, group), (torch.device("cpu"), slice(0, None), None)):
        leaf = logits[:, part].to(place).requires_grad_()
        logprobs, entropy = chunked_logprobs(
            leaf,
            torch.eye(leaf.shape[1], dtype=leaf.dtype, device=place),
            targets.to(place),
            sampling=sampling,
            vocab=VocabSlice(part.start, ranks if ranks and ranks.size() > 1 else None),
            chunk_size=1024,
        )
        (grad,) = torch.autograd.grad((logprobs + entropy).sum(), leaf)
        found[place.type] = (logprobs.detach(), entropy.detach(), grad)
    ours, theirs = found[device.type], found["cpu"]
    parts = (slice(None), slice(None), (slice(None), own))
    return [
        (a.cpu().double() - b[part].double()).abs().max().item()
        for a, b, part in zip(ours, theirs, parts, strict=True)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["one rank", pytest.param("TP 2", marks=pytest.mark.gpu(2))])
def test_tokens_that_cannot_be_sampled_are_left_out_as_on_cpu(lab, gpu_models, layout, dtype):
    policy = lab.policy(gpu_config(gpu_models["qwen3-tied", 0], **LAYOUTS[layout]))
    for differences in policy.call("run", truncated, dtype):
        assert max(differences) < (1e-4 if dtype == "float32" else 2e-2), differences
