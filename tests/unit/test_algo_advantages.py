import math

import pytest
import torch
from algo_cases import make_groups
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algo.advantages import ADVANTAGE_EPS, group_relative_advantages, rewards_matrix

rewards_lists = st.integers(2, 6).flatmap(
    lambda G: st.lists(
        st.lists(st.floats(-3, 3), min_size=G, max_size=G),
        min_size=1,
        max_size=5,
    )
)


def test_rewards_are_the_totals_in_group_order():
    groups = make_groups([[3, 2], [4, 1]])
    expected = [[reward.total for reward in group.rewards] for group in groups]
    assert rewards_matrix(groups).tolist() == expected


def test_worked_values():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    group = group_relative_advantages(rewards, scale_rewards="group")
    # Group 1: mean 1/4, unbiased variance (9/16 + 3 * 1/16) / 3 = 1/4, std 1/2.
    assert group[0, 0] == pytest.approx(0.75 / (0.5 + 1e-4))
    assert group[0, 1] == pytest.approx(-0.25 / (0.5 + 1e-4))
    # Group 2: mean 1/2, unbiased variance (4 * 1/4) / 3.
    assert group[1, 0] == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4))
    # Batch: mean 3/8, unbiased variance (3 * 25/64 + 5 * 9/64) / 7 = 120/448; group means remain.
    batch = group_relative_advantages(rewards, scale_rewards="batch")
    assert batch[0, 0] == pytest.approx(0.75 / (math.sqrt(120 / 448) + 1e-4))
    assert group_relative_advantages(rewards, scale_rewards="none")[0].tolist() == [
        0.75,
        -0.25,
        -0.25,
        -0.25,
    ]


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@given(rewards=rewards_lists)
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(scale_rewards, rewards):
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    advantages_PG = group_relative_advantages(rewards_PG, scale_rewards=scale_rewards)
    assert advantages_PG.dtype == torch.float32
    assert torch.allclose(advantages_PG.sum(dim=1), torch.zeros(len(rewards)), atol=1e-5)
    by_reward = advantages_PG.gather(1, rewards_PG.argsort(dim=1))
    assert (by_reward.diff(dim=1) >= 0).all()


@given(rewards=rewards_lists)
def test_advantages_scaled_by_group_are_bounded(rewards):
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    G = rewards_PG.shape[1]
    advantages_PG = group_relative_advantages(rewards_PG, scale_rewards="group")
    assert advantages_PG.abs().max() <= (G - 1) / math.sqrt(G) + 1e-6


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_equal_rewards_give_no_advantage(scale_rewards):
    rewards_PG = torch.full((2, 3), 0.1)
    assert group_relative_advantages(rewards_PG, scale_rewards=scale_rewards).abs().max() < 1e-9


@given(rewards=rewards_lists, scale=st.floats(10, 1000))
def test_dividing_by_the_std_forgets_the_unit_of_rewards(rewards, scale):
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    if rewards_PG.std(dim=1).min() < 0.1:
        return  # there ADVANTAGE_EPS is no longer small
    plain = group_relative_advantages(rewards_PG, scale_rewards="group")
    scaled = group_relative_advantages(rewards_PG * scale, scale_rewards="group")
    assert torch.allclose(plain, scaled, rtol=2 * ADVANTAGE_EPS / 0.1)


def test_a_group_of_one_says_what_to_change():
    with pytest.raises(ValueError, match="num_generations"):
        group_relative_advantages(torch.zeros(4, 1), scale_rewards="none")
