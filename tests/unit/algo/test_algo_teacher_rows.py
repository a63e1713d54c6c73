"""What a teacher said of each token arrives at this token, however rows are dealt and packed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algo.batching import build_sample_batch, pack
from rlsys.algo.teacher_rows import join_rows, num_targets, split_rows, to_array
from rlsys.types import Sample


def make_batch(lengths, seed=0):
    """Samples with random targets."""
    rng = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(lengths):
        mask = rng.random(length) < 0.5
        mask[0] = False
        samples.append(Sample(str(number), rng.integers(0, 90, length).astype(np.int32), mask))
    return build_sample_batch(samples)


def packed_values(packed, dtype=torch.float32):
    """A value for each trained token: the token before it, and the token itself."""
    both = torch.stack([packed.input_ids, packed.targets], dim=1).to(dtype)
    return both[packed.loss_mask]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=7),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_values_come_back_to_their_tokens(dtype, lengths, seed, data):
    batch = make_batch(lengths, seed)
    weights = torch.zeros(batch.input_ids.shape)
    rows = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(1, len(lengths) - 1))
    parts = []
    for own in (rows[:cut], rows[cut:]):  # two ranks, each with micro-batches of two rows
        micro = [own[i : i + 2] for i in range(0, len(own), 2)]
        packed = [pack(batch, one, weights, multiple_of=4) for one in micro]
        found = [{"hidden": packed_values(one, dtype)} for one in packed]
        parts.append((own, split_rows(found, batch, own)))
    batch.teacher = join_rows(parts, len(lengths))
    assert [len(row) for row in batch.teacher.hidden] == [
        num_targets(batch, row) for row in range(len(lengths))
    ]
    again = data.draw(st.permutations(range(len(lengths))))
    packed = pack(batch, again, weights)
    assert packed.teacher_hidden.dtype == dtype
    assert torch.equal(packed.teacher_hidden, packed_values(packed, dtype))


def test_rows_that_train_nothing_have_no_values():
    batch = make_batch([5, 6])
    batch.teacher = join_rows(
        [
            ([row], split_rows([{"hidden": torch.ones(num_targets(batch, row), 3)}], batch, [row]))
            for row in (0, 1)
        ],
        2,
    )
    batch.completion_mask = torch.zeros_like(batch.completion_mask)
    packed = pack(batch, [1], torch.zeros(batch.input_ids.shape))
    assert packed.teacher_hidden.shape == (0, 3)


def test_a_rank_that_left_out_a_row_is_noticed():
    batch = make_batch([5, 6])
    values = {"hidden": torch.ones(num_targets(batch, 0), 3)}
    with pytest.raises(ValueError, match="shorter"):
        join_rows([([0, 1], split_rows([values], batch, [0]))], 2)


def test_bits_of_bfloat16_survive():
    values = torch.randn(7, 3).bfloat16()
    array = to_array(values)
    assert array.dtype == np.int16
    assert torch.equal(torch.from_numpy(array).view(torch.bfloat16), values)
