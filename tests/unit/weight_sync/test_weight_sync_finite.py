"""The pass of the checksum finds every NaN and infinity that is sent, and no number that is not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.weight_sync import checksum as module
from rlsys.weight_sync.checksum import CHUNK_WORDS, FiniteChecksums, checksum
from rlsys.weight_sync.plan import DTYPES, TensorMeta, plan_buckets

BAD = st.sampled_from([torch.nan, torch.inf, -torch.inf])
LAYOUTS = {
    "one type": [("a", "bfloat16", (3, 7)), ("b", "bfloat16", (129,)), ("c", "bfloat16", (2, 2))],
    "float32": [("a", "float32", (3, 7)), ("b", "float32", (129,)), ("c", "float32", ())],
    "half": [("a", "float16", (5,)), ("b", "float16", (129,)), ("c", "float16", (8,))],
    "mixed": [("a", "bfloat16", (3, 7)), ("b", "float32", (33,)), ("c", "float16", (9,))],
}


def filled(metadata, *, bucket_bytes=1 << 30, value=None):
    """Buckets with their data; the memory between tensors holds NaNs of other types' bits."""
    buckets = plan_buckets([TensorMeta(*meta) for meta in metadata], bucket_bytes)
    data = [torch.zeros(bucket.nbytes, dtype=torch.uint8) for bucket in buckets]
    for bucket, buffer in zip(buckets, data, strict=True):
        for _, view in bucket.views(buffer):
            view.copy_(torch.randn(view.shape) if value is None else value)
    return buckets, data


def found(buckets, data):
    sums = FiniteChecksums(buckets)
    for bucket, buffer in zip(buckets, data, strict=True):
        assert sums.add(bucket, buffer) == checksum(buffer)
    return sums.nonfinite()


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 2), st.data(), BAD)
def test_one_bad_number_anywhere_is_found_in_its_tensor(layout, tensor, draw, bad):
    buckets, data = filled(LAYOUTS[layout], bucket_bytes=draw.draw(st.sampled_from([100, 1 << 30])))
    assert found(buckets, data) == []
    name = "abc"[tensor]
    view = next(
        view
        for bucket, buffer in zip(buckets, data, strict=True)
        for own, view in bucket.views(buffer)
        if own == name
    )
    view.view(-1)[draw.draw(st.integers(0, view.numel() - 1))] = bad
    names = found(buckets, data)
    assert name in names
    if layout == "mixed":
        assert names == [name]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("kind", ["max", "tiny", "smallest_normal", "min"])
def test_the_largest_and_smallest_numbers_are_finite(dtype, kind):
    value = getattr(torch.finfo(DTYPES[dtype]), kind)
    assert found(*filled([("a", dtype, (300,)), ("b", dtype, (7,))], value=value)) == []


def test_a_tensor_is_named_by_the_chunk_that_the_number_is_in():
    metadata = [(name, "float32", (CHUNK_WORDS,)) for name in "abcd"]
    buckets, data = filled(metadata)
    dict(buckets[0].views(data[0]))["c"][17] = torch.nan
    assert found(buckets, data) == ["c"]


@given(
    st.sampled_from(sorted(module.EXPONENTS, key=str)),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20),
)
def test_the_kernel_of_gpus_says_what_isfinite_says(dtype, words):
    """Not compiled here: the same operations, on words of any bits."""
    words_W = torch.tensor(words, dtype=torch.int32)
    weights_W = torch.arange(1, len(words) + 1)
    total, flag = module._weighted_sum_and_flag(words_W, weights_W, *module.EXPONENTS[dtype])
    assert total == (words_W.long() * weights_W).sum()
    assert flag == ~words_W.view(dtype).isfinite().all()
