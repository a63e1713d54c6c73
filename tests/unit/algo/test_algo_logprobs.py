import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.logprobs import chunked_logprobs, chunked_token_values
from rlsys.algo.sampling import Sampling

TEMPERATURES = [1.0, 0.7]


def expected_logprobs(logits, targets, temperature):
    log_softmax = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(-1, targets[:, None]).squeeze(-1), entropy.detach()


def random_logits(tokens=9, vocab=21, *, scale=5.0, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(tokens, vocab, generator=rng)).to(dtype).requires_grad_()
    return logits, torch.randint(0, vocab, (tokens,), generator=rng)


def logprobs_of(logits, targets, *, temperature=1.0):
    """`chunked_logprobs` of these logits: their product with an identity is exact."""
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    return chunked_logprobs(
        logits, identity, targets, sampling=Sampling(temperature), chunk_size=1024
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@settings(max_examples=25)
@given(scale=st.floats(0, 100), seed=st.integers(0, 99))
def test_equals_log_softmax_in_value_and_gradient(temperature, scale, seed):
    logits, targets = random_logits(scale=scale, seed=seed)
    upstream = torch.linspace(-2, 2, len(targets))
    expected, entropy = expected_logprobs(logits, targets, temperature)
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), logits)
    logprobs, our_entropy = logprobs_of(logits, targets, temperature=temperature)
    (grad,) = torch.autograd.grad((logprobs * upstream).sum(), logits)
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_entropy, entropy, rtol=1e-5, atol=1e-5)
    # Softmax of float32 logits of hundreds has errors of eps * hundreds.
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6 * (1 + scale))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@settings(max_examples=25)
@given(scale=st.floats(0, 30), seed=st.integers(0, 99), of_logprob=st.sampled_from([0.0, 1.5]))
def test_the_gradient_of_the_entropy_is_autograds(temperature, scale, seed, of_logprob):
    logits, targets = random_logits(scale=scale, seed=seed, dtype=torch.float64)
    upstream = torch.linspace(-2, 2, len(targets), dtype=torch.float64)

    def loss(logprobs, entropy):
        return (upstream * (of_logprob * logprobs + entropy)).sum()

    log_softmax = torch.log_softmax(logits / temperature, dim=-1)
    expected_logprobs = log_softmax.gather(-1, targets[:, None]).squeeze(-1)
    expected_entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    (expected,) = torch.autograd.grad(loss(expected_logprobs, expected_entropy), logits)
    ours = logprobs_of(logits, targets, temperature=temperature)
    (grad,) = torch.autograd.grad(loss(*ours), logits)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_finite_differences():
    logits, targets = random_logits(4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: logprobs_of(z, targets, temperature=0.7), logits)


def test_bfloat16_logits_give_float32_logprobs_and_bfloat16_gradients():
    logits, targets = random_logits(dtype=torch.bfloat16)
    logprobs, entropy = logprobs_of(logits, targets)
    expected, expected_entropy = expected_logprobs(logits.float(), targets, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    assert grad.dtype == torch.bfloat16


def test_a_padded_vocabulary_changes_nothing():
    logits, targets = random_logits()
    # Not -inf, which has no product: 0 * -inf = nan.
    padded = torch.nn.functional.pad(logits.detach(), (0, 3), value=-1e30).requires_grad_()
    plain = logprobs_of(logits, targets)
    with_padding = logprobs_of(padded, targets)
    torch.testing.assert_close(with_padding, plain, rtol=1e-6, atol=1e-6)
    (with_padding[0] + 3 * with_padding[1]).sum().backward()
    (plain[0] + 3 * plain[1]).sum().backward()
    torch.testing.assert_close(padded.grad[:, :-3], logits.grad, rtol=1e-5, atol=1e-5)
    assert (padded.grad[:, -3:] == 0).all()


def test_huge_logits_stay_finite():
    logits = torch.tensor([[1e30, -1e30, 0.0]], requires_grad=True)
    logprobs, entropy = logprobs_of(logits, torch.tensor([0]))
    logprobs.sum().backward()
    assert logprobs.item() == 0
    assert entropy.item() == 0
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_a_token_outside_the_vocabulary_is_an_error_not_a_number():
    logits, _ = random_logits(2, 5)
    with pytest.raises(RuntimeError, match="out of bounds"):
        logprobs_of(logits, torch.tensor([0, 5]))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@settings(max_examples=25)
@given(tokens=st.integers(1, 12), chunk_size=st.integers(1, 14), recompute=st.booleans())
def test_chunks_change_neither_value_nor_gradient(temperature, tokens, chunk_size, recompute):
    rng = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 6, generator=rng, requires_grad=True)
    weight = torch.randn(17, 6, generator=rng, requires_grad=True)
    targets = torch.randint(0, 17, (tokens,), generator=rng)
    upstream = torch.randn(tokens, generator=rng)

    whole, entropy = logprobs_of(hidden @ weight.T, targets, temperature=temperature)
    total = (whole * upstream + entropy).sum()
    expected = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    kwargs = {"sampling": Sampling(temperature), "chunk_size": chunk_size, "recompute": recompute}
    chunked, chunked_entropy = chunked_logprobs(hidden, weight, targets, **kwargs)
    total = (chunked * upstream + chunked_entropy).sum()
    grads = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(chunked_entropy, entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)

    frozen, _ = chunked_logprobs(hidden, weight.detach(), targets, **kwargs)
    (expected,) = torch.autograd.grad((whole * upstream).sum(), hidden, retain_graph=True)
    (grad,) = torch.autograd.grad((frozen * upstream).sum(), hidden)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        without_grad, _ = chunked_logprobs(hidden, weight, targets, **kwargs)
    assert torch.equal(without_grad, chunked)


def test_the_gradient_of_a_narrow_weight_is_rounded_once_not_once_a_chunk():
    """Summed in bfloat16, 256 equal gradients of one chunk each would stop growing on the way."""
    tokens = 256
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    upstream = torch.full((tokens,), 1 + 2**-7)
    logprobs, _ = chunked_logprobs(hidden, weight, targets, sampling=Sampling(), chunk_size=1)
    (grad,) = torch.autograd.grad((logprobs * upstream).sum(), weight)
    # A half of each upstream gradient goes to the target, the other to the other token.
    assert grad.flatten().tolist() == [tokens * (1 + 2**-7) / 2, -tokens * (1 + 2**-7) / 2]


def test_chunks_never_hold_all_logits():
    tokens, vocab, chunk_size = 64, 1000, 8
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        targets = torch.zeros(tokens, dtype=torch.int64)
        chunked_logprobs(hidden, weight, targets, sampling=Sampling(), chunk_size=chunk_size)
    assert max(kept, default=0) < chunk_size * vocab


@pytest.mark.parametrize(("recompute", "expected"), [(True, [4]), (False, [10, 10, 4])])
def test_only_the_last_logits_are_kept_and_only_until_they_are_used(recompute, expected):
    hidden, weight = torch.randn(24, 4, requires_grad=True), torch.randn(50, 4)
    targets = torch.zeros(24, dtype=torch.int64)
    kwargs = {"sampling": Sampling(), "chunk_size": 10, "recompute": recompute}
    logprobs, _ = chunked_logprobs(hidden, weight, targets, **kwargs)
    kept = logprobs.grad_fn.kept_logits
    assert [len(logits) for logits in kept] == expected
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    assert kept == []
    assert torch.equal(torch.autograd.grad(logprobs.sum(), hidden)[0], grad)  # computed again


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_likeliest_token_is_argmax(temperature):
    logits, targets = random_logits(tokens=200, vocab=5)
    is_likeliest = chunked_token_values(
        logits, torch.eye(5), targets, sampling=Sampling(temperature), chunk_size=70
    ).is_likeliest
    assert torch.equal(is_likeliest, (logits.argmax(-1) == targets).float())
    assert 20 < is_likeliest.sum() < 60
    assert not is_likeliest.requires_grad
