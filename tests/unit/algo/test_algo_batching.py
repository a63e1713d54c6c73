from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from algo_cases import make_batch, make_groups, padded_batch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algo.batching import (
    build_train_batch,
    micro_batches,
    optimizer_step_rows,
    pack,
    shard_rows,
    unpack_logprobs,
)
from rlsys.algo.weighting import keep_high_entropy, loss_weights
from rlsys.config.algorithm import Aggregation

AGGREGATIONS = get_args(Aggregation)
lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=40)
group_lengths = st.lists(
    st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=4
).filter(lambda lengths: any(map(any, lengths)))


def flat(pieces):
    return sorted(row for piece in pieces for row in piece)


def test_rows_hold_prompt_and_completion_and_train_on_every_sampled_token():
    groups = make_groups([[3, 1], [2, 5]], prompt_lengths=[2, 4])
    batch = build_train_batch(groups)
    assert batch.input_ids.shape == (4, 9)
    assert batch.lengths.tolist() == [5, 3, 6, 9]
    assert batch.advantages.tolist() == [[0.0] * 9] * 4  # not known yet
    for n, (p, g) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        prompt, completion = groups[p].prompt, groups[p].completions[g]
        row = prompt.token_ids + completion.token_ids
        assert batch.input_ids[n].tolist() == row + [0] * (9 - len(row))
        mask = batch.completion_mask[n]
        # The last one, EOS, is trained on; so are the tokens of a completion cut at the limit.
        assert batch.input_ids[n][mask].tolist() == completion.token_ids
        assert batch.rollout_logprobs[n][mask].tolist() == pytest.approx(
            completion.rollout_logprobs
        )
        assert batch.rollout_logprobs[n][~mask].abs().sum() == 0


def test_a_prompt_without_tokens_is_named():
    groups = make_groups([[1, 1]], prompt_lengths=[0])
    with pytest.raises(ValueError, match="'p0' has no tokens"):
        build_train_batch(groups)


def test_loss_weights_worked():
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    kinds = {
        "seq_mean_token_mean": [1 / 9, 1 / 3],
        "token_mean": [1 / 4, 1 / 4],
        "seq_mean_token_sum": [1 / 3, 1 / 3],
        "seq_mean_token_sum_norm": [1 / 30, 1 / 30],
    }
    assert set(kinds) == set(AGGREGATIONS)
    for aggregation, (first, second) in kinds.items():
        weights = loss_weights(mask, aggregation=aggregation, max_completion_length=10)
        expected = mask * torch.tensor([[first], [second], [0.0]])
        assert torch.allclose(weights, expected), aggregation


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_weights_of_an_optimizer_step_ignore_the_other_rows(aggregation):
    mask = make_batch([[3, 1], [5, 2]]).completion_mask
    rows = [3, 1]
    weights = loss_weights(mask, aggregation=aggregation, max_completion_length=7, rows=rows)
    alone = loss_weights(mask[rows], aggregation=aggregation, max_completion_length=7)
    assert torch.equal(weights[rows], alone)
    assert weights[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_tokens_at_all_weigh_nothing(aggregation):
    weights = loss_weights(
        torch.zeros(2, 3, dtype=torch.bool), aggregation=aggregation, max_completion_length=7
    )
    assert weights.tolist() == [[0.0] * 3] * 2


@given(st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=4))
def test_on_policy_the_grpo_loss_is_zero_whatever_the_lengths(lengths_PG):
    batch = make_batch(lengths_PG)
    weights = loss_weights(
        batch.completion_mask, aggregation="seq_mean_token_mean", max_completion_length=9
    )
    assert (weights * batch.advantages).sum().abs() < 1e-6


@given(
    per_step=st.integers(1, 6),
    num_steps=st.integers(1, 5),
    num_iterations=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_each_pass_takes_every_row_once(per_step, num_steps, num_iterations, seed):
    kwargs = {"global_batch_size": per_step, "num_iterations": num_iterations, "seed": seed}
    steps = optimizer_step_rows(per_step * num_steps, **kwargs)
    assert steps == optimizer_step_rows(per_step * num_steps, **kwargs)
    assert [len(step) for step in steps] == [per_step] * num_steps * num_iterations
    for i in range(num_iterations):
        one_pass = steps[i * num_steps : (i + 1) * num_steps]
        assert flat(one_pass) == list(range(per_step * num_steps))


def test_passes_and_seeds_shuffle_differently():
    first, second = optimizer_step_rows(64, global_batch_size=32, num_iterations=2, seed=1)[::2]
    other_seed = optimizer_step_rows(64, global_batch_size=32, num_iterations=1, seed=2)[0]
    assert len({tuple(rows) for rows in (first, second, other_seed, range(32))}) == 4


def test_one_step_keeps_the_order():
    assert optimizer_step_rows(4, global_batch_size=4, num_iterations=2, seed=0) == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]


@given(lengths=lengths_lists, num_shards=st.integers(1, 8), data=st.data())
def test_shards_cover_rows_with_equal_counts_and_balanced_tokens(lengths, num_shards, data):
    rows = data.draw(st.permutations(range(len(lengths))))
    shards = shard_rows(rows, torch.tensor(lengths), num_shards=num_shards)
    assert flat(shards) == sorted(rows)
    counts = [len(shard) for shard in shards]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(lengths[row] for row in shard) for shard in shards]
    assert max(tokens) - min(tokens) <= max(lengths)
    # Ranks compute their shards each for itself.
    assert shards == shard_rows(sorted(rows), lengths, num_shards=num_shards)


@given(lengths=lengths_lists, max_tokens=st.none() | st.integers(60, 300), size=st.integers(1, 9))
def test_micro_batches_cover_rows_within_the_limit(lengths, max_tokens, size):
    rows = list(range(len(lengths)))[::2] or [0]
    cut = micro_batches(rows, lengths, micro_batch_size=size, max_tokens=max_tokens)
    assert flat(cut) == rows
    assert all(cut)
    if max_tokens is None:
        assert all(len(piece) == size for piece in cut[:-1])
        assert len(cut[-1]) <= size
    else:
        tokens = [sum(lengths[row] for row in piece) for piece in cut]
        assert max(tokens) <= max_tokens
        # No two micro-batches could have been one: first fit leaves none to merge.
        assert all(a + b > max_tokens for i, a in enumerate(tokens) for b in tokens[:i])


def test_a_shard_with_few_tokens_gets_the_next_long_row():
    shards = shard_rows(range(4), [9, 5, 4, 1], num_shards=2)
    assert [set(shard) for shard in shards] == [{0, 3}, {1, 2}]


def test_micro_batches_may_be_exactly_full():
    assert micro_batches(range(4), [6, 4, 5, 5], micro_batch_size=1, max_tokens=10) == [
        [0, 1],
        [2, 3],
    ]


def test_rows_of_similar_length_share_a_micro_batch():
    cut = micro_batches(range(6), [50, 3, 51, 4, 52, 5], micro_batch_size=3, max_tokens=None)
    assert [set(piece) for piece in cut] == [{0, 2, 4}, {1, 3, 5}]


def test_no_rows_are_no_micro_batches():
    for max_tokens in (None, 5):
        assert micro_batches([], [], micro_batch_size=8, max_tokens=max_tokens) == []


def test_pack_aligns_with_the_predicting_position():
    groups = make_groups([[2, 0]], prompt_lengths=[2])
    batch = padded_batch(groups)
    batch.advantages = torch.tensor([[0.0, 0.0, 0.7, 0.9], [0.0] * 4])
    (a, b), (c, d) = groups[0].prompt.token_ids, groups[0].completions[0].token_ids
    weights = loss_weights(
        batch.completion_mask, aggregation="seq_mean_token_mean", max_completion_length=2
    )
    packed = pack(batch, [0, 1], weights, multiple_of=8)
    assert packed.input_ids.tolist() == [a, b, c, d, a, b, 0, 0]
    assert packed.targets.tolist() == [b, c, d, 0, b, 0, 0, 0]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 4
    assert packed.loss_mask.tolist() == [False, True, True, False] + [False] * 4
    assert packed.weights.tolist() == [0.0, 0.25, 0.25] + [0.0] * 5
    assert packed.advantages.tolist() == pytest.approx([0.0, 0.7, 0.9] + [0.0] * 5)
    rollout = groups[0].completions[0].rollout_logprobs
    assert packed.rollout_logprobs.tolist() == pytest.approx([0.0, *rollout] + [0.0] * 5)
    assert packed.ref_logprobs is None
    assert packed.old_logprobs is None


@given(
    lengths_PG=group_lengths,
    multiple_of=st.sampled_from([1, 2, 8]),
    more=st.none() | st.integers(0, 3),
    data=st.data(),
)
def test_pack_and_unpack_are_inverse(lengths_PG, multiple_of, more, data):
    batch = make_batch(lengths_PG)
    weights = loss_weights(batch.completion_mask, aggregation="token_mean", max_completion_length=5)
    order = data.draw(st.permutations(range(len(batch.lengths))))
    half = data.draw(st.integers(1, len(order)))
    out = {name: torch.full(batch.input_ids.shape, 7.0) for name in ("old", "ref", "rollout")}
    for rows in filter(None, (order[:half], order[half:])):
        num_tokens = int(batch.lengths[rows].sum())
        total = None
        if more is not None:
            total = num_tokens + -num_tokens % multiple_of + more * multiple_of
        packed = pack(batch, rows, weights, multiple_of=multiple_of, total_tokens=total)
        size = len(packed.input_ids)
        assert size % multiple_of == 0
        assert size - num_tokens < multiple_of if total is None else size == total
        assert packed.cu_seqlens[-1] == size
        assert packed.max_seqlen == packed.cu_seqlens.diff().max()
        for values in (packed.position_ids, packed.targets, packed.weights, packed.loss_mask):
            assert len(values) == size
        assert packed.weights.sum() == pytest.approx(weights[rows].sum().item())
        assert packed.loss_mask.sum() == batch.completion_mask[rows].sum()
        for name, values in out.items():
            unpack_logprobs(getattr(packed, f"{name}_logprobs"), packed, values, rows)
    for name, values in out.items():
        assert torch.equal(values, getattr(batch, f"{name}_logprobs")), name


def test_unpacked_values_are_zero_where_masked():
    batch = make_batch([[2, 0]])
    packed = pack(batch, [0, 1], torch.zeros(batch.input_ids.shape))
    out = torch.full(batch.input_ids.shape, 7.0)
    unpack_logprobs(torch.full(packed.targets.shape, -3.0), packed, out, [0, 1])
    assert torch.equal(out, -3.0 * batch.completion_mask)


@pytest.mark.parametrize(("multiple_of", "total_tokens"), [(1, 5), (4, 10)])
def test_a_total_that_does_not_fit_is_named(multiple_of, total_tokens):
    batch = make_batch([[2, 2]])
    assert batch.lengths.sum() == 8
    with pytest.raises(ValueError, match=f"of 8 tokens .* up to {total_tokens} tokens"):
        pack(
            batch,
            [0, 1],
            torch.zeros(batch.input_ids.shape),
            multiple_of=multiple_of,
            total_tokens=total_tokens,
        )


def test_moving_a_micro_batch_moves_every_tensor():
    batch = make_batch([[2, 3]])
    packed = pack(batch, [0, 1], torch.zeros(batch.input_ids.shape)).to("meta")
    assert packed.max_seqlen == 5
    for name in ("input_ids", "cu_seqlens", "weights", "ref_logprobs", "old_logprobs"):
        assert getattr(packed, name).device.type == "meta"


def test_tokens_of_high_entropy_worked():
    """arXiv:2506.01939: the threshold is the 0.6 quantile of the step's five tokens for 0.4."""
    entropies = torch.tensor([[9.0, 0.1, 0.5, 0.3], [9.0, 0.2, 0.9, 9.0], [9.0, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    advantages = mask * 2.0
    kept = of_high_entropy(advantages, entropies, mask, rows=[0, 1], quantile=0.4)
    # Ordered 0.1 0.2 0.3 0.5 0.9: position 0.6 * 4 = 2.4, threshold 0.3 + 0.4 * 0.2 = 0.38.
    assert kept[:2].tolist() == [[0, 0, 2, 0], [0, 0, 2, 0]]
    everything = of_high_entropy(advantages, entropies, mask, rows=[0, 1], quantile=1.0)
    assert torch.equal(everything, advantages)


def of_high_entropy(advantages, entropies, mask, *, rows, quantile):
    batch = SimpleNamespace(advantages=advantages, entropies=entropies, completion_mask=mask)
    return keep_high_entropy(batch, rows, quantile=quantile)


@given(
    lengths_PG=group_lengths,
    quantile=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_the_share_of_tokens_of_high_entropy(lengths_PG, quantile, seed):
    batch = make_batch(lengths_PG)
    mask = batch.completion_mask
    entropies = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))
    rows = range(len(mask))
    ones = mask.float()
    kept = of_high_entropy(ones, entropies, mask, rows=rows, quantile=quantile)
    is_kept = kept.bool()
    assert torch.equal(kept, ones * is_kept)
    assert abs(is_kept.sum().item() - quantile * mask.sum().item()) <= 1 + 1e-6
    left_out = mask & ~is_kept
    if left_out.any():
        assert entropies[left_out].max() < entropies[is_kept].min()


def test_a_step_without_tokens_has_no_threshold():
    nothing = torch.zeros(2, 3)
    kept = of_high_entropy(nothing, nothing, nothing.bool(), rows=[0, 1], quantile=0.2)
    assert torch.equal(kept, nothing)


@pytest.mark.parametrize("sequence_multiple_of", [1, 4])
def test_routing_travels_with_its_tokens(sequence_multiple_of):
    batch = make_batch([[3, 1], [2, 5]])
    rng = np.random.default_rng(0)
    batch.routed_experts = [
        rng.integers(1, 9, (length - 1, 3, 2)).astype(np.int16) for length in batch.lengths.tolist()
    ]
    rows = [2, 0, 3]
    packed = pack(
        batch,
        rows,
        torch.zeros(batch.input_ids.shape),
        multiple_of=8,
        sequence_multiple_of=sequence_multiple_of,
    )
    assert packed.routed_experts.dtype == torch.int16
    lengths, starts = batch.lengths.tolist(), packed.cu_seqlens.tolist()
    assert len(packed.is_token) == len(packed.is_routed) == len(packed.routed_experts)
    assert packed.is_token.sum() == sum(lengths[row] for row in rows)
    for row, start in zip(rows, starts, strict=False):
        end = start + lengths[row]
        assert packed.is_token[start:end].all()
        assert packed.is_routed[start : end - 1].all()
        assert not packed.is_routed[end - 1]  # the engine never read the last token
        replayed = packed.routed_experts[start : end - 1].numpy()
        assert np.array_equal(replayed, batch.routed_experts[row])
    assert not packed.routed_experts[~packed.is_routed].any()


def test_completions_bring_their_routing():
    groups = make_groups([[3, 1]], prompt_lengths=[2])
    assert build_train_batch(groups).routed_experts is None
    routing = [np.ones((2 + length - 1, 4, 2), np.uint8) for length in (3, 1)]
    completions = [
        replace(completion, routed_experts=own)
        for completion, own in zip(groups[0].completions, routing, strict=True)
    ]
    batch = build_train_batch([replace(groups[0], completions=completions)])
    assert all(a is b for a, b in zip(batch.routed_experts, routing, strict=True))
