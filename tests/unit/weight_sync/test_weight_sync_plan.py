"""Buckets and checksums: no tensor is lost, moved or damaged without an error."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.weight_sync.checksum import CHUNK_WORDS, as_numbers, checksum, compare_checksums
from rlsys.weight_sync.plan import DTYPES, TensorMeta, plan_buckets, shard_bounds
from rlsys.weight_sync.transport import WeightSyncError

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)
tensor_lists = st.lists(st.tuples(st.sampled_from(list(DTYPES)), shapes), min_size=1, max_size=12)
byte_tensors = st.binary(min_size=1, max_size=200).map(
    lambda data: torch.tensor(list(data), dtype=torch.uint8)
)


@given(length=st.integers(1, 10**6), num_shards=st.integers(1, 64))
def test_shards_of_any_length_follow_each_other_and_only_the_last_are_shorter(length, num_shards):
    bounds = [shard_bounds(length, index, num_shards) for index in range(num_shards)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == length
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert sizes == sorted(sizes, reverse=True)
    if length % num_shards == 0:
        assert set(sizes) == {length // num_shards}
    if length >= num_shards**2:  # as every vocabulary: no rank is without a token
        assert min(sizes) > 0


@given(tensor_lists, st.integers(1, 600))
def test_every_tensor_travels_once_and_arrives_as_it_was(specs, bucket_bytes):
    metadata = [TensorMeta(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(specs)]
    arrived = []
    for bucket in plan_buckets(metadata, bucket_bytes):
        assert bucket.nbytes <= bucket_bytes or len(bucket.tensors) == 1
        buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for number, (_, view) in enumerate(bucket.views(buffer)):
            view.fill_(number + 1)
        # Read after all were written: no tensor lies over another.
        for number, (name, view) in enumerate(bucket.views(buffer)):
            assert bool((view == number + 1).all())
            arrived.append(TensorMeta(name, str(view.dtype)[6:], tuple(view.shape)))
    assert arrived == metadata


def test_buckets_are_filled():
    metadata = [TensorMeta(f"t{i}", "float32", (4,)) for i in range(10)]  # 16 bytes each
    buckets = plan_buckets(metadata, 64)
    assert [len(bucket.tensors) for bucket in buckets] == [4, 4, 2]
    assert str(buckets[0]) == "bucket 0 (4 tensors, t0 to t3)"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([], "no tensors"),
        ([TensorMeta("a", "float32", (1,))] * 2, "'a' twice"),
        ([TensorMeta("a", "int8", (1,))], "'a' has type 'int8'.*float32, bfloat16, float16"),
    ],
)
def test_impossible_plans_are_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        plan_buckets(metadata, 100)


@given(byte_tensors, st.data())
def test_a_flipped_bit_is_seen(data, draw):
    position = draw.draw(st.integers(0, data.numel() - 1))
    damaged = data.clone()
    damaged[position] ^= 1 << draw.draw(st.integers(0, 7))
    assert checksum(damaged) != checksum(data)


@given(byte_tensors, st.data())
def test_swapped_bytes_are_seen(data, draw):
    i, j = (draw.draw(st.integers(0, data.numel() - 1)) for _ in range(2))
    swapped = data.clone()
    swapped[i], swapped[j] = data[j], data[i]
    assert (checksum(swapped) == checksum(data)) == bool((data[i] == data[j]).item())


@given(byte_tensors, st.integers(1, 9))
def test_missing_zeros_at_the_end_are_seen(data, zeros):
    assert checksum(torch.cat([data, data.new_zeros(zeros)])) != checksum(data)


def test_swapped_tensors_are_seen_across_chunks():
    chunk = 4 * CHUNK_WORDS
    data = torch.arange(3 * chunk, dtype=torch.int64).to(torch.uint8)
    data[chunk:] += 1
    parts = data.split(chunk)
    in_order, swapped = torch.cat(parts), torch.cat([parts[1], parts[0], parts[2]])
    assert checksum(in_order) == checksum(data)
    assert checksum(swapped) != checksum(data)


@given(byte_tensors)
def test_the_checksum_depends_on_the_bytes_alone(data):
    shifted = torch.cat([data.new_zeros(1), data])[1:]  # starts in the middle of a word
    strided = torch.stack([data, data + 1], dim=1)[:, 0]
    assert checksum(shifted) == checksum(strided) == checksum(data)


def test_the_checksum_is_this_number_on_every_machine():
    data = torch.arange(1000, dtype=torch.int64).to(torch.uint8)
    assert as_numbers([checksum(data)]) == [0x20790BF0BAE21064]


def test_a_mismatch_names_receiver_bucket_and_tensors():
    metadata = [TensorMeta(name, "float32", (8,)) for name in ("a.weight", "b.weight", "c.weight")]
    buckets = plan_buckets(metadata, 64)
    compare_checksums(buckets, [1, 2], [1, 2], receiver="rollout engine 0")
    message = r"rollout engine 0 received other bytes.*bucket 0 of 2.*a\.weight, b\.weight$"
    with pytest.raises(WeightSyncError, match=message):
        compare_checksums(buckets, [1, 2], [3, 2], receiver="rollout engine 0")
