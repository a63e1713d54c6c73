"""Batches of pairs, never divided, with denominators of the whole step; KTO mismatched rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_oracle import algorithm

from rlsys.algo.batching import micro_batches, shard_rows
from rlsys.algo.losses import compute_loss
from rlsys.algo.preferences import (
    HeldOut,
    answer_logps,
    as_loss_input,
    build_preference_batch,
    estimated_kl,
    held_out_metrics,
    mismatched,
)
from rlsys.algo.update_metrics import MetricSums
from rlsys.types import Preference, Sample


def sample(name, prompt, answer):
    ids = np.array([*prompt, *answer], dtype=np.int32)
    return Sample(name, ids, np.arange(len(ids)) >= len(prompt))


def rows_of(number, *, seed=0, is_paired=True):
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(number):
        prompt = rng.integers(0, 50, 1 + n % 4)
        answers = [sample(f"{n}", prompt, rng.integers(0, 50, 1 + rng.integers(9))) for _ in "wl"]
        if is_paired:
            rows.append(Preference(f"r{n}", tuple(answers), (True, False)))
        else:
            rows.append(Preference(f"r{n}", (answers[0],), (n % 3 != 1,)))
    return rows


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12),
    shards=st.integers(1, 4),
    size=st.integers(1, 5),
    max_tokens=st.none() | st.integers(80, 200),
)
def test_no_rank_and_no_micro_batch_divides_a_pair(lengths, shards, size, max_tokens):
    flat = [length for pair in lengths for length in pair]
    dealt = shard_rows(range(len(flat)), flat, num_shards=shards, together=2)
    assert sorted(row for shard in dealt for row in shard) == list(range(len(flat)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 2
    for shard in dealt:
        parts = micro_batches(shard, flat, micro_batch_size=size, max_tokens=max_tokens, together=2)
        assert sorted(row for part in parts for row in part) == sorted(shard)
        for part in parts:
            assert [row % 2 for row in part] == [0, 1] * (len(part) // 2)
            assert all(part[i + 1] == part[i] + 1 for i in range(0, len(part), 2))
            if max_tokens is None:
                assert len(part) <= 2 * size
            else:
                assert sum(flat[row] for row in part) <= max_tokens


def test_a_batch_has_the_chosen_answers_first_and_their_share_of_the_likelihood():
    rows = rows_of(3)
    batch = build_preference_batch(rows, at_least=5)
    assert batch.is_chosen.tolist() == [True, False] * 3 + [False] * 4
    assert batch.lengths.tolist()[6:] == [1] * 4
    assert not batch.completion_mask[6:].any()
    for n, row in enumerate(rows):
        for k, answer in enumerate(row.answers):
            own = batch.input_ids[2 * n + k, : len(answer.token_ids)]
            assert own.tolist() == answer.token_ids.tolist()
    chosen = batch.completion_mask & batch.is_chosen[:, None]
    assert torch.equal(batch.advantages > 0, chosen)
    assert batch.advantages.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("section", [{"rpo_alpha": 0.5}, {"loss_type": "orpo"}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_held_out_metrics_do_not_depend_on_the_parts(section, size):
    config = algorithm(**section)
    rows = rows_of(7, seed=3)
    rng = torch.Generator().manual_seed(0)
    logps = {id(a): -3 * torch.rand(40, generator=rng) - 0.1 for row in rows for a in row.answers}
    refs = {row.row_id: torch.randn(2, generator=rng, dtype=torch.float64) - 9 for row in rows}

    def metrics(size):
        parts = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = build_preference_batch(part, at_least=3)
            own = torch.zeros(batch.input_ids.shape)
            for n, answer in enumerate(answer for row in part for answer in row.answers):
                own[n] = logps[id(answer)][: own.shape[1]]
            missing = len(batch.lengths) - 2 * len(part)
            known = torch.cat([*(refs[row.row_id] for row in part), torch.zeros(missing)])
            batch.ref_logps = known.double() if config.preference.has_reference else None
            parts.append(HeldOut(batch, own * batch.completion_mask))
        return held_out_metrics(parts, config)

    whole = metrics(len(rows))
    assert metrics(size) == pytest.approx(whole, rel=1e-5)
    assert 0 <= whole["rewards/accuracies"] <= 1
    assert whole["num_loss_tokens"] == sum(a.num_targets for row in rows for a in row.answers)


def test_a_micro_batch_that_repeats_a_row_trains_nothing():
    config = algorithm(rpo_alpha=0.5)
    batch = build_preference_batch(rows_of(2))
    batch.completion_mask[:] = False
    batch.is_chosen = None
    logprobs = torch.full(batch.input_ids.shape, torch.nan, requires_grad=True)
    loss, statistics = compute_loss(as_loss_input(batch, logprobs, 4), config)
    assert loss.item() == 0
    loss.backward()
    assert not logprobs.grad.any()
    whole = build_preference_batch(rows_of(2))
    whole.ref_logps = torch.zeros(4, dtype=torch.float64)
    _, others = compute_loss(as_loss_input(whole, -torch.ones(whole.input_ids.shape), 4), config)
    assert statistics.keys() == others.keys()


def test_mismatched_answers_are_those_to_the_prompt_before():
    rows = [
        Preference("a", (sample("a", [1, 2], [10, 11, 12]),), (True,)),
        Preference("b", (sample("b", [3], [20]),), (False,)),
        Preference("c", (sample("c", [4, 5, 6], [30, 31]),), (True,)),
    ]
    made = mismatched(rows, max_length=5)
    assert [one.token_ids.tolist() for one in made] == [
        [1, 2, 30, 31],
        [3, 10, 11, 12],
        [4, 5, 6, 20],
    ]
    masks = [one.target_mask.astype(int).tolist() for one in made]
    assert masks == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]
    assert [len(one.token_ids) for one in mismatched(rows, max_length=3)] == [3, 3, 3]


@pytest.mark.parametrize(
    ("prompts", "shift"), [("aabb", 2), ("aabbcc", 2), ("aaabbbccc", 3), ("abab", 1), ("aaa", 1)]
)
def test_mismatched_answers_are_to_other_prompts_where_rows_have_them(prompts, shift):
    rows = [
        Preference(f"{n}", (sample(f"{n}", [ord(prompt)], [n]),), (True,))
        for n, prompt in enumerate(prompts)
    ]
    answers = [int(one.token_ids[1]) for one in mismatched(rows, max_length=5)]
    assert answers == [(n - shift) % len(rows) for n in range(len(rows))]


def test_the_kl_is_a_mean_that_is_never_below_zero():
    policy = torch.tensor([[0.0, -1.0], [0.5, -2.0], [0.0, 0.0]])
    assert answer_logps(policy).tolist() == [-1.0, -1.5, 0.0]
    parts = [torch.tensor([1.0, 0.5]), torch.tensor([3.0, 0.0])]  # the last is of no answer
    assert estimated_kl(parts, 3).tolist() == [1.5]
    assert estimated_kl([-ratios for ratios in parts], 3).tolist() == [0.0]


def test_answers_of_one_label_have_no_margin():
    rows = [Preference(f"{n}", (sample(f"{n}", [1], [2, 3]),), (True,)) for n in range(3)]
    config = algorithm(loss_type="apo_zero_unpaired")
    batch = build_preference_batch(rows)
    batch.ref_logps = torch.zeros(3, dtype=torch.float64)
    sums = MetricSums()
    sums.add(compute_loss(as_loss_input(batch, -torch.ones(3, 3), 3), config)[1])
    metrics = sums.means()
    assert metrics["rewards/chosen"] == pytest.approx(-0.2)
    assert not {"rewards/rejected", "rewards/margins", "rewards/accuracies"} & metrics.keys()
    assert not {"num_chosen", "num_rejected"} & metrics.keys()
