"""The gated delta rule in chunks is the recurrence of transformers, and its gradient is too."""

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as oracle

from rlsys.engines.megatron import gated_delta


def inputs(length, *, heads=3, key_dim=8, value_dim=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, heads, length, key_dim, generator=rng) for _ in range(2))
    value = torch.randn(2, heads, length, value_dim, generator=rng)
    decay = -torch.rand(2, heads, length, generator=rng) * 3
    beta = torch.rand(2, heads, length, generator=rng)
    norm = torch.nn.functional.normalize
    return [
        x.requires_grad_() for x in (norm(query, dim=-1), norm(key, dim=-1), value, decay, beta)
    ]


@pytest.mark.parametrize("length", [1, 7, 64, 65, 200])
def test_chunks_are_the_recurrence_token_by_token(length):
    tensors = inputs(length)
    expected, _ = oracle.torch_recurrent_gated_delta_rule(
        *(x.transpose(1, 2) for x in tensors[:3]),
        g=tensors[3].mT,
        beta=tensors[4].mT,
    )
    scaled = [tensors[0] * tensors[0].shape[-1] ** -0.5, *tensors[1:]]
    found = gated_delta.gated_delta_rule(*scaled).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    of_found = torch.autograd.grad((found * weights).sum(), tensors)
    of_expected = torch.autograd.grad((expected * weights).sum(), tensors)
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_a_decay_that_forgets_everything_has_a_finite_gradient():
    """exp of a difference of large decays overflows above the diagonal, where nothing may look."""
    tensors = inputs(130)
    with torch.no_grad():
        tensors[3].mul_(100)
    found = gated_delta.gated_delta_rule(*tensors)
    assert found.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), tensors))
