"""Finding NaNs and infinities with one look at each tensor."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.engines.megatron.nonfinite import all_finite

NUMBERS = st.lists(
    st.sampled_from([0.0, 1.0, -3e38, 3e38, 1e-45, torch.nan, torch.inf, -torch.inf]), max_size=6
)


@given(st.lists(NUMBERS, max_size=3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_what_isfinite_says_of_every_number(lists, dtype):
    """Also where a sum of large numbers is infinite, and one of two infinities NaN."""
    tensors = [torch.tensor(numbers, dtype=dtype) for numbers in lists]
    assert all_finite(tensors) == all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_whole_numbers_are_finite():
    assert all_finite([torch.tensor([3]), torch.tensor([True]), torch.empty(0)])
