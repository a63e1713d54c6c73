"""Every estimator against values worked out by hand, and properties of all of them."""

import math
from dataclasses import replace

import pytest
import torch
from algo_cases import make_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.advantages import (
    advantage_estimators,
    advantages_of_group,
    compute_advantages,
    register_advantage_estimator,
    rewards_matrix,
)
from rlsys.algo.batching import build_train_batch
from rlsys.algo.weighting import leave_out
from rlsys.config import GrpoConfig
from rlsys.types import RewardOutput

NAN = math.nan
rewards_lists = st.integers(2, 6).flatmap(
    lambda G: st.lists(
        st.lists(st.floats(-3, 3), min_size=G, max_size=G),
        min_size=1,
        max_size=5,
    )
)


def scored(rewards_PG, *, by_name_PGF=None, lengths_PG=None):
    """Groups with these totals; without `by_name_PGF` one reward function, the total itself."""
    lengths_PG = lengths_PG or [[1] * len(rewards) for rewards in rewards_PG]
    by_name_PGF = by_name_PGF or [[[r] for r in rewards] for rewards in rewards_PG]
    return [
        replace(
            group,
            rewards=[
                RewardOutput(total=r, by_name={f"f{i}": x for i, x in enumerate(each)})
                for r, each in zip(totals, by_name_GF, strict=True)
            ],
        )
        for group, totals, by_name_GF in zip(
            make_groups(lengths_PG), rewards_PG, by_name_PGF, strict=True
        )
    ]


def token_advantages(groups, *, weights=None, ref_shift=None, **grpo):
    """[N, S] and the mask; with `ref_shift` the reference's log-probs are so much below."""
    batch = build_train_batch(groups)
    if ref_shift is not None:
        batch.old_logprobs = batch.rollout_logprobs
        batch.ref_logprobs = (batch.old_logprobs - ref_shift) * batch.completion_mask
    return compute_advantages(groups, batch, GrpoConfig(**grpo), weights), batch.completion_mask


def advantages(rewards_PG, *, by_name_PGF=None, weights=None, **grpo):
    """[P, G] where every completion has one token."""
    groups = scored(rewards_PG, by_name_PGF=by_name_PGF)
    values_NS, mask_NS = token_advantages(groups, weights=weights, **grpo)
    return values_NS[mask_NS].view(len(rewards_PG), -1)


def test_rewards_are_the_totals_in_group_order():
    groups = make_groups([[3, 2], [4, 1]])
    expected = [[reward.total for reward in group.rewards] for group in groups]
    assert rewards_matrix(groups).tolist() == expected


def test_group_relative_worked():
    """DeepSeekMath (arXiv:2402.03300), section 4.1.2; Dr. GRPO (arXiv:2503.20783), section 3.2."""
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    group = advantages(rewards)
    # Group 1: mean 1/4, unbiased variance (9/16 + 3 * 1/16) / 3 = 1/4, std 1/2.
    assert group[0, 0] == pytest.approx(0.75 / (0.5 + 1e-4))
    assert group[0, 1] == pytest.approx(-0.25 / (0.5 + 1e-4))
    # Group 2: mean 1/2, unbiased variance (4 * 1/4) / 3.
    assert group[1, 0] == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4))
    # Batch: mean 3/8, unbiased variance (3 * 25/64 + 5 * 9/64) / 7 = 120/448; group means remain.
    batch = advantages(rewards, scale_rewards="batch")
    assert batch[0, 0] == pytest.approx(0.75 / (math.sqrt(120 / 448) + 1e-4))
    assert advantages(rewards, scale_rewards="none")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    other_eps = advantages(rewards, advantage_eps=0.5)
    assert other_eps[0, 0] == pytest.approx(0.75 / (0.5 + 0.5))


def test_leave_one_out_worked():
    """RLOO (arXiv:2402.14740), section 3.2: each less the mean of the others."""
    assert advantages([[3.0, 0.0, 0.0, 1.0]], advantage_estimator="rloo").tolist() == [
        [
            pytest.approx(3 - 1 / 3),
            pytest.approx(0 - 4 / 3),
            pytest.approx(0 - 4 / 3),
            pytest.approx(1 - 1),
        ]
    ]


def test_normalize_then_sum_worked():
    """GDPO (arXiv:2601.05242): totals 1, 1, 0, 0 hide that the two functions differ in spread."""
    by_name = [[[1.0, 0.0], [0.0, 10.0], [0.0, 0.0], [0.0, 0.0]]]
    totals = [[1.0, 5.0, 0.0, 0.0]]
    config = {"multi_objective_aggregation": "normalize_then_sum", "weights": [1.0, 0.5]}
    ours = advantages(totals, by_name_PGF=by_name, **config)
    # Function 1: mean 1/4, std 1/2. Function 2: mean 2.5, variance (7.5^2 + 3 * 2.5^2) / 3 = 25.
    first = [0.75 / (0.5 + 1e-4), *[-0.25 / (0.5 + 1e-4)] * 3]
    second = [-2.5 / (5 + 1e-4), 7.5 / (5 + 1e-4), *[-2.5 / (5 + 1e-4)] * 2]
    sums = [a + 0.5 * b for a, b in zip(first, second, strict=True)]
    mean = sum(sums) / 4
    std = math.sqrt(sum((x - mean) ** 2 for x in sums) / 3)
    assert ours[0].tolist() == pytest.approx([(x - mean) / (std + 1e-4) for x in sums], rel=1e-6)
    # Summed first, the function with the larger numbers would decide: 5 against 1.
    assert ours[0, 0] / ours[0, 1] > 2 * (totals[0][0] / totals[0][1])


def test_reinforce_plus_plus_worked():
    """REINFORCE++ (arXiv:2501.03262): no group; KL of the tokens to come; whitened over tokens."""
    groups = scored([[1.0, 0.0]], lengths_PG=[[2, 1]])
    options = {"advantage_estimator": "reinforce_plus_plus", "advantage_eps": 1e-12}
    values, mask = token_advantages(groups, **options)
    # Token returns 1, 1, 0: mean 2/3, unbiased variance (1/9 + 1/9 + 4/9) / 2 = 1/3.
    expected = [(1 / 3) * math.sqrt(3)] * 2 + [(-2 / 3) * math.sqrt(3)]
    assert values[mask].tolist() == pytest.approx(expected)
    # log(old / ref) = 0.1 a token, beta 2: returns 1 - 0.4, 1 - 0.2, 0 - 0.2.
    values, mask = token_advantages(groups, **options, beta=2.0, kl_in_reward=True, ref_shift=0.1)
    returns = [0.6, 0.8, -0.2]
    mean = sum(returns) / 3
    std = math.sqrt(sum((r - mean) ** 2 for r in returns) / 2)
    assert values[mask].tolist() == pytest.approx([(r - mean) / std for r in returns], rel=1e-5)


def test_reinforce_plus_plus_baseline_worked():
    """REINFORCE++ (arXiv:2501.03262), the variant with the group's mean: whitened over tokens."""
    groups = scored([[1.0, 0.0], [5.0, 5.0]], lengths_PG=[[1, 3], [2, 2]])
    values, mask = token_advantages(
        groups, advantage_estimator="reinforce_plus_plus_baseline", advantage_eps=1e-12
    )
    # Tokens 0.5, 3 x -0.5, 4 x 0: mean -1/8, sum of squares 1, variance (1 - 8/64) / 7 = 1/8.
    expected = [x * math.sqrt(8) for x in [0.625] + [-0.375] * 3 + [0.125] * 4]
    assert values[mask].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_a_kl_in_the_reward_is_charged_for_the_whole_completion(estimator):
    groups = scored([[1.0, 1.0]], lengths_PG=[[4, 2]])
    options = {"advantage_estimator": estimator, "scale_rewards": "none"}
    assert token_advantages(groups, **options)[0].abs().max() == 0
    values, mask = token_advantages(groups, **options, beta=0.5, kl_in_reward=True, ref_shift=0.2)
    # KL 4 * 0.2 and 2 * 0.2 nats: rewards 0.6 and 0.8.
    size = 0.1 if estimator == "grpo" else 0.2
    assert values[mask].tolist() == pytest.approx([-size] * 4 + [size] * 2, rel=1e-5)


ESTIMATORS = sorted(advantage_estimators)
SCALES = ["auto", "group", "batch", "none"]


def test_maxrl_worked():
    """MaxRL (arXiv:2602.02710): the reward less the mean, divided by it; 0 where none solved."""
    values = advantages(
        [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0] * 4, [1.0] * 4],
        advantage_estimator="maxrl",
    )
    expected = [[3, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1], [0] * 4, [0] * 4]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_maxrl_says_that_rewards_must_not_be_negative():
    with pytest.raises(ValueError, match=r"rewards must be 0 or more, and one is -0.5: shift it"):
        advantages([[1.0, -0.5]], advantage_estimator="maxrl")


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("scale_rewards", SCALES)
@settings(max_examples=25)
@given(rewards=rewards_lists)
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(estimator, scale_rewards, rewards):
    values_PG = advantages(rewards, advantage_estimator=estimator, scale_rewards=scale_rewards)
    assert values_PG.dtype == torch.float32
    assert torch.allclose(values_PG.sum(dim=1), torch.zeros(len(rewards)), atol=1e-4)
    by_reward = values_PG.gather(1, torch.tensor(rewards).argsort(dim=1))
    assert (by_reward.diff(dim=1) >= -1e-6).all()


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
@settings(max_examples=25)
@given(rewards=rewards_lists)
def test_whitened_advantages_sum_to_zero_over_the_batch(estimator, rewards):
    values_PG = advantages(rewards, advantage_estimator=estimator)
    assert values_PG.sum().item() == pytest.approx(0, abs=1e-4)
    assert values_PG.std() <= 1 + 1e-6


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=25)
@given(rewards=rewards_lists, data=st.data())
def test_order_of_groups_and_of_completions_does_not_matter(estimator, rewards, data):
    if estimator == "maxrl":
        rewards = [[abs(r) for r in group] for group in rewards]
    order = data.draw(st.permutations(range(len(rewards))))
    within = data.draw(st.permutations(range(len(rewards[0]))))
    values = advantages(rewards, advantage_estimator=estimator)
    permuted = advantages(
        [[rewards[p][g] for g in within] for p in order], advantage_estimator=estimator
    )
    torch.testing.assert_close(permuted, values[order][:, within], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"maxrl"}))
@settings(max_examples=25)
@given(rewards=rewards_lists, shift=st.floats(-5, 5))
def test_a_reward_that_everyone_gets_changes_nothing(estimator, rewards, shift):
    values = advantages(rewards, advantage_estimator=estimator)
    shifted = advantages(
        [[r + shift for r in group] for group in rewards], advantage_estimator=estimator
    )
    torch.testing.assert_close(shifted, values, rtol=1e-4, atol=1e-4)


@settings(max_examples=25)
@given(rewards=rewards_lists, scale=st.floats(10, 1000))
def test_scaling_of_rewards(rewards, scale):
    scaled = [[scale * r for r in group] for group in rewards]
    by_none = {"scale_rewards": "none"}
    torch.testing.assert_close(
        advantages(scaled, **by_none), scale * advantages(rewards, **by_none), rtol=1e-4, atol=1e-3
    )
    if torch.tensor(rewards, dtype=torch.float64).std(dim=1).min() > 0.1:
        # Otherwise advantage_eps is no longer small.
        torch.testing.assert_close(advantages(scaled), advantages(rewards), rtol=2e-3, atol=1e-6)


@settings(max_examples=25)
@given(rewards=rewards_lists)
def test_advantages_scaled_by_group_are_bounded(rewards):
    G = len(rewards[0])
    assert advantages(rewards).abs().max() <= (G - 1) / math.sqrt(G) + 1e-6


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_equal_rewards_give_no_advantage(estimator, aggregation):
    values = advantages(
        [[0.1] * 3] * 2, advantage_estimator=estimator, multi_objective_aggregation=aggregation
    )
    assert values.abs().max() < 1e-9


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_dropped_completion_leaves_no_trace(estimator, aggregation):
    """NaN as a total: the others get what they would get had it never been sampled."""
    options = {"advantage_estimator": estimator, "multi_objective_aggregation": aggregation}
    values = advantages([[1.0, NAN, 0.0, 0.5], [0.3, 0.1, NAN, 0.2]], **options)
    without = advantages([[1.0, 0.0, 0.5], [0.3, 0.1, 0.2]], **options)
    torch.testing.assert_close(values[0, [0, 2, 3]], without[0])
    torch.testing.assert_close(values[1, [0, 1, 3]], without[1])
    assert values[0, 1] == values[1, 2] == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rewards", [[[NAN, NAN], [1.0, 0.0]], [[NAN, 1.0], [NAN, NAN]]])
def test_groups_that_lose_all_or_all_but_one_have_finite_advantages(estimator, rewards):
    values = advantages(rewards, advantage_estimator=estimator)
    assert values.isfinite().all()
    assert (values[torch.tensor(rewards).isnan()] == 0).all()


@settings(max_examples=25)
@given(given_to_the_dropped=st.floats(-100, 100))
def test_what_a_dropped_completion_got_from_other_functions_leaves_no_trace(given_to_the_dropped):
    """One function failed on it, so its total is NaN; the other one had given it a reward."""
    aggregation = {"multi_objective_aggregation": "normalize_then_sum"}
    kept = [[1.0, 0.2], [0.0, 0.9], [0.5, 0.4]]
    totals = [sum(each) for each in kept]
    by_name = [[*kept, [NAN, given_to_the_dropped]]]
    values = advantages([[*totals, NAN]], by_name_PGF=by_name, **aggregation)
    without = advantages([totals], by_name_PGF=[kept], **aggregation)
    torch.testing.assert_close(values[0, :3], without[0])
    assert values[0, 3] == 0


def test_a_function_that_says_nothing_is_left_out_of_the_sum():
    by_name = [[[1.0, NAN], [0.0, NAN], [0.0, 1.0]]]
    values = advantages(
        [[1.0, 0.0, 1.0]],
        by_name_PGF=by_name,
        multi_objective_aggregation="normalize_then_sum",
    )
    # The second function has one value in the group: nothing to compare it with.
    alone = advantages(
        [[1.0, 0.0, 0.0]],
        by_name_PGF=[[[1.0], [0.0], [0.0]]],
        multi_objective_aggregation="normalize_then_sum",
    )
    torch.testing.assert_close(values, alone)


def test_every_token_of_a_completion_has_its_advantage_and_others_none():
    groups = scored([[1.0, 0.0], [0.0, 1.0]], lengths_PG=[[3, 1], [2, 5]])
    values, mask = token_advantages(groups, scale_rewards="none")
    assert torch.equal(values != 0, mask)
    assert values.sum(dim=1).tolist() == [1.5, -0.5, -1.0, 2.5]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale_rewards", SCALES)
def test_what_one_group_tells_is_what_the_batch_says(estimator, scale_rewards):
    groups = scored([[1.0, 0.0, 0.25], [0.5, NAN, 1.0]])
    options = {"advantage_estimator": estimator, "scale_rewards": scale_rewards}
    values, mask = token_advantages(groups, **options)
    found = [advantages_of_group(group, GrpoConfig(**options), None) for group in groups]
    if estimator in ("grpo", "rloo", "maxrl") and scale_rewards != "batch":
        assert found == values[mask].view(2, 3).tolist()
    else:
        assert found == [None, None]


def test_what_is_left_out_of_the_loss():
    groups = scored([[1.0, NAN], [0.0, 1.0]], lengths_PG=[[3, 1], [2, 5]])
    # make_groups marks the longest of each group as cut at the limit.
    batch = build_train_batch(groups)
    sampled = batch.completion_mask.clone()
    batch.advantages = compute_advantages(groups, batch, GrpoConfig(), None)
    leave_out(batch, groups, mask_truncated_completions=False)
    assert batch.kept.tolist() == [True, False, True, True]
    assert torch.equal(batch.completion_mask, sampled & batch.kept[:, None])
    leave_out(batch, groups, mask_truncated_completions=True)
    assert batch.kept.tolist() == [True, False, True, True]
    assert batch.completion_mask.any(dim=1).tolist() == [False, False, True, False]
    for values in (batch.advantages, batch.rollout_logprobs):
        assert (values[~batch.completion_mask] == 0).all()
        assert (values[batch.completion_mask] != 0).all()


def test_an_estimator_of_ones_own_is_one_function():
    @register_advantage_estimator("plain-of-a-test")
    def plain(inputs, config):
        return inputs.over_tokens(inputs.rewards_PG)

    try:
        assert advantages([[1.0, 3.0]], advantage_estimator="plain-of-a-test").tolist() == [[1, 3]]
    finally:
        del advantage_estimators["plain-of-a-test"]
