"""The cut of sequences into chunks over ranks: every token once, equal work, the same results."""

import pytest
import torch
from algo_cases import make_batch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algo.batching import pack, unpack_logprobs
from rlsys.algo.context_parallel import chunk_positions

sizes = st.sampled_from([1, 2, 3, 4])


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_two_ranks_worked():
    # Chunks of 2 in the first sequence and of 1 in the second.
    positions = chunk_positions(cu_seqlens_of([8, 4]), 2)
    assert positions.tolist() == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


@given(size=sizes, units=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_ranks_share_tokens_and_the_work_of_attention_equally(size, units):
    lengths = [2 * size * unit for unit in units]
    positions = chunk_positions(cu_seqlens_of(lengths), size)
    assert sorted(positions.flatten().tolist()) == list(range(sum(lengths)))
    # What a token of a causal sequence attends to, itself included.
    work = torch.cat([torch.arange(1, length + 1) for length in lengths])[positions].sum(1)
    assert (work == work[0]).all()


def test_one_rank_has_all_tokens_of_sequences_of_any_length():
    assert chunk_positions(cu_seqlens_of([3, 1, 5]), 1).tolist() == [list(range(9))]


def test_a_sequence_that_does_not_divide_is_a_bug():
    with pytest.raises(AssertionError):
        chunk_positions(cu_seqlens_of([8, 6]), 2)


@given(size=sizes, seed=st.integers(0, 20), rows=st.permutations([0, 1, 2]), tail=st.booleans())
def test_filled_sequences_hold_the_same_tokens_and_train_on_the_same(size, seed, rows, tail):
    batch = make_batch([[3, 1], [2, 5]], seed=seed)
    weights = torch.rand(batch.input_ids.shape) * batch.completion_mask
    sequence_multiple = 2 * size if size > 1 else 1
    plain = pack(batch, rows, weights)
    total = 12 * size * len(rows) if tail else None
    filled = pack(
        batch,
        rows,
        weights,
        multiple_of=sequence_multiple,
        sequence_multiple_of=sequence_multiple,
        total_tokens=total,
    )
    assert (filled.cu_seqlens.diff() % sequence_multiple == 0).all()
    assert len(filled.input_ids) == filled.cu_seqlens[-1]
    for name in ("targets", "weights", "advantages", "rollout_logprobs"):
        of_filled, of_plain = getattr(filled, name), getattr(plain, name)
        assert torch.equal(of_filled[filled.loss_mask], of_plain[plain.loss_mask]), name
        assert (of_filled[~filled.loss_mask] == 0).all() or name == "targets"
    for i, row in enumerate(rows):
        length, start = int(batch.lengths[row]), filled.cu_seqlens[i]
        tokens = filled.input_ids[start : filled.cu_seqlens[i + 1]]
        assert torch.equal(tokens[:length], batch.input_ids[row, :length])
        assert (tokens[length:] == 0).all()
        assert filled.position_ids[start : start + length].tolist() == list(range(length))
    values = torch.rand(len(filled.input_ids))
    out = torch.full(batch.input_ids.shape, torch.nan)
    unpack_logprobs(values, filled, out, rows)
    assert torch.equal(out[rows] != 0, batch.completion_mask[rows])
    assert torch.equal(
        torch.cat([out[row][batch.completion_mask[row]] for row in rows]), values[filled.loss_mask]
    )
