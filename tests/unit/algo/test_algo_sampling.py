"""The policy's distribution is the one that completions are sampled from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.logprobs import chunked_logprobs
from rlsys.algo.sampling import Sampling

TEMPERATURE = 0.6


def as_sampled(logits, sampling):
    """[T, V] log-probs that vLLM samples by: sorted, cut, and normalised again."""
    z = logits / sampling.temperature
    if sampling.num_token_ids is not None:
        z[:, sampling.num_token_ids :] = -torch.inf
    if sampling.min_p:
        probs = z.softmax(dim=-1)
        z = z.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    ascending, order = z.sort(dim=-1)
    if sampling.top_k:
        ascending = ascending.masked_fill(
            ascending < ascending[:, -sampling.top_k, None], -torch.inf
        )
    if sampling.top_p < 1:
        cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        cut[:, -1] = False
        ascending = ascending.masked_fill(cut, -torch.inf)
    return z.scatter(-1, order, ascending).log_softmax(dim=-1)


def logprobs_of(logits, targets, sampling, *, chunk_size=1024, **kwargs):
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    return chunked_logprobs(
        logits, identity, targets, sampling=sampling, chunk_size=chunk_size, **kwargs
    )


samplings = st.builds(
    Sampling,
    temperature=st.just(TEMPERATURE),
    top_k=st.sampled_from([0, 1, 3, 20]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    num_token_ids=st.sampled_from([None, 25, 30]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@settings(max_examples=30)  # each has a hundred passes over its logits
@given(sampling=samplings, seed=st.integers(0, 99), scale=st.sampled_from([0.1, 2.0, 20.0]))
def test_logprobs_are_those_of_sampling(sampling, seed, scale):
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(8, 30, generator=rng, dtype=torch.float64)
    expected = as_sampled(logits.clone(), sampling)
    targets = torch.multinomial(expected.exp(), 1, generator=rng).squeeze(-1)
    logits.requires_grad_()
    logprobs, entropy = logprobs_of(logits, targets, sampling, chunk_size=5)
    torch.testing.assert_close(logprobs.detach(), expected.gather(-1, targets[:, None])[:, 0])
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    onehot = torch.nn.functional.one_hot(targets, 30)
    torch.testing.assert_close(grad, (onehot - expected.exp()) / TEMPERATURE)
    finite = expected.clamp(min=-1e9)
    torch.testing.assert_close(entropy.detach(), -(expected.exp() * finite).sum(-1))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(TEMPERATURE, 3, 0.8),
        Sampling(TEMPERATURE, num_token_ids=5),
        Sampling(TEMPERATURE, min_p=0.3),
    ],
)
def test_gradients_of_both_results_are_finite_differences(sampling, recompute):
    """What is kept stays the same for small changes of the logits."""
    rng = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(4, 7, generator=rng, dtype=torch.float64)).requires_grad_()
    targets = logits.detach()[:, :5].argmax(-1)
    assert torch.autograd.gradcheck(
        lambda z: logprobs_of(z, targets, sampling, recompute=recompute, chunk_size=3), logits
    )


def test_a_target_that_rounding_leaves_out_keeps_a_probability():
    logits = torch.tensor([[5.0, 4.0, 1.0, 0.9, -3.0]])
    sampling = Sampling(TEMPERATURE, top_k=3)
    inside, _ = logprobs_of(logits, torch.tensor([2]), sampling)
    outside, _ = logprobs_of(logits, torch.tensor([3]), sampling)
    assert torch.isfinite(outside).all()
    assert (inside - outside).abs() < 0.2


def test_bfloat16_logits_keep_what_their_own_values_say():
    # No two are equal in a row: of equal ones at the bound, sorting cuts some, and rlsys none.
    rows = [torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    logits = (torch.stack(rows) / 4).bfloat16()
    sampling = Sampling(TEMPERATURE, top_p=0.9)
    expected = as_sampled(logits.float(), sampling)
    targets = expected.argmax(-1)
    logprobs, _ = logprobs_of(logits, targets, sampling)
    torch.testing.assert_close(logprobs, expected.amax(-1), rtol=1e-5, atol=1e-5)


def test_without_settings_nothing_is_left_out():
    logits = torch.tensor([[1.0, 2.0, -7.0]])
    logprobs, _ = logprobs_of(logits, torch.tensor([0]), Sampling(TEMPERATURE, num_token_ids=3))
    torch.testing.assert_close(logprobs, (logits / TEMPERATURE).log_softmax(-1)[:, 0])
