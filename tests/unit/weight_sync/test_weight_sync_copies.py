"""Planned copies equal copies one by one, for tensors of any strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.weight_sync.copies import MAX_PIECES, CopyPlan

DTYPES = [torch.float32, torch.bfloat16]


@st.composite
def views(draw, shape):
    """A tensor of that shape: whole, a slice of an axis of a larger one, or transposed."""
    larger = [size + draw(st.integers(0, 2)) for size in shape]
    base = torch.randn(larger if draw(st.booleans()) else larger[::-1])
    if base.shape != torch.Size(larger):
        base = base.permute(*reversed(range(base.dim())))
    for axis, size in enumerate(shape):
        base = base.narrow(axis, draw(st.integers(0, base.shape[axis] - size)), size)
    return base


@st.composite
def copies(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    return [draw(views(shape)).to(dtype) for _ in range(2)]


@given(st.lists(copies(), min_size=1, max_size=6))
def test_every_run_copies_the_current_sources(pairs):
    plan = CopyPlan(pairs)
    for _ in range(2):
        for _, source in pairs:
            source.normal_()
        plan.run()
        for target, source in pairs:
            assert torch.equal(target, source)


@pytest.mark.parametrize("pieces", [2, MAX_PIECES + 1])
def test_elements_beside_a_slice_do_not_change(pieces):
    whole, source = torch.zeros(pieces, 3, 4), torch.randn(pieces, 2, 4)
    CopyPlan([(whole[:, 1:], source)]).run()
    assert torch.equal(whole[:, 1:], source)
    assert not whole[:, 0].any()


def test_types_are_not_mixed_up():
    sources = [torch.randn(3).bfloat16(), torch.randn(3), torch.randn(3).half()]
    targets = [torch.empty_like(source) for source in sources]
    CopyPlan(zip(targets, sources, strict=True)).run()
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source)
