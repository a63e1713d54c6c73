import math
import statistics
from dataclasses import replace

import pytest
from algo_cases import make_groups

from rlsys.algo.advantages import compute_advantages
from rlsys.algo.batching import build_train_batch
from rlsys.algo.rollout_metrics import evaluation_metrics, rollout_metrics, speculation_metrics
from rlsys.config import GrpoConfig
from rlsys.types import DraftCounts, RewardOutput


def groups_with_rewards(rewards_PG, lengths_PG=None):
    lengths_PG = lengths_PG or [[2] * len(rewards) for rewards in rewards_PG]
    groups = make_groups(lengths_PG, prompt_lengths=[3] * len(rewards_PG))
    scored = []
    for group, rewards in zip(groups, rewards_PG, strict=True):
        outputs = [RewardOutput(total=r, by_name={"a": r, "b": 2 * r}) for r in rewards]
        scored.append(replace(group, rewards=outputs))
    return scored


def metrics_of(groups):
    batch = build_train_batch(groups)
    batch.advantages = compute_advantages(groups, batch, GrpoConfig(scale_rewards="none"), None)
    return rollout_metrics(groups, batch)


def test_rewards_worked():
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]
    metrics = metrics_of(groups_with_rewards(rewards))
    flat = rewards[0] + rewards[1]
    assert metrics["reward"] == pytest.approx(statistics.mean(flat))
    # The mean over groups of the std within the group, not the std over all completions.
    assert metrics["reward_std"] == pytest.approx(statistics.stdev(rewards[0]) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/a/mean"] == pytest.approx(statistics.mean(flat))
    assert metrics["rewards/b/mean"] == pytest.approx(2 * statistics.mean(flat))
    assert metrics["rewards/b/std"] == pytest.approx(2 * statistics.stdev(flat))
    assert metrics["advantages/abs_mean"] == pytest.approx(0.25)
    assert metrics["advantages/abs_max"] == pytest.approx(0.5)


@pytest.mark.parametrize("nothing", [[math.nan] * 2, [math.nan, 3.0]])
def test_a_group_with_nothing_to_compare_is_in_no_statistic_of_groups(nothing):
    alone = metrics_of(groups_with_rewards([[1.0, 0.0], [1.0, 1.0]]))
    beside = metrics_of(groups_with_rewards([nothing, [1.0, 0.0], nothing, [1.0, 1.0]]))
    assert alone["reward_std"] == pytest.approx(0.5**0.5 / 2)
    assert alone["frac_reward_zero_std"] == 0.5
    for key in alone:
        if key.endswith(("reward_std", "zero_std", "group_std")):
            assert beside[key] == alone[key], key
    if nothing[1] != 3.0:
        for key in ("reward", "rewards/a/mean", "rewards/a/std"):
            assert beside[key] == alone[key], key


def test_without_any_rewards_their_statistics_are_not_known():
    metrics = metrics_of(groups_with_rewards([[math.nan] * 2]))
    for key in ("reward", "reward_std", "frac_reward_zero_std"):
        assert math.isnan(metrics[key]), key


def test_lengths_worked():
    metrics = metrics_of(groups_with_rewards([[0.0, 1.0], [1.0, 0.0]], [[4, 2], [6, 3]]))
    # make_groups marks the longest of each group as cut: 4 and 6.
    assert metrics["completions/mean_length"] == 15 / 4
    assert metrics["completions/min_length"] == 2
    assert metrics["completions/max_length"] == 6
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["completions/mean_terminated_length"] == 2.5
    assert metrics["completions/min_terminated_length"] == 2
    assert metrics["completions/max_terminated_length"] == 3
    assert metrics["num_prompt_tokens"] == 12  # 3 tokens, once per completion
    assert metrics["num_completion_tokens"] == 15


def test_evaluations_have_groups_of_one():
    two = evaluation_metrics(groups_with_rewards([[0.0], [2.0]]))
    assert two["reward"] == two["rewards/a/mean"] == 1
    assert two["rewards/b/std"] == pytest.approx(2 * math.sqrt(2))
    assert two["completions/mean_length"] == 2
    one = evaluation_metrics(groups_with_rewards([[1.0]]))
    assert one["rewards/a/mean"] == 1
    assert one["rewards/a/std"] == 0
    for metrics in (one, two):
        assert "reward_std" not in metrics
        assert all(map(math.isfinite, metrics.values()))


def test_all_completions_cut_at_the_limit():
    metrics = metrics_of(groups_with_rewards([[0.0, 1.0]], [[4, 4]]))
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["completions/mean_terminated_length"] == 0


def test_every_metric_is_a_plain_finite_number():
    for name, value in metrics_of(groups_with_rewards([[0.0, 1.0]])).items():
        assert type(value) is float, name
        assert math.isfinite(value), name


def test_kept_drafts_are_a_share_of_drafted_tokens_and_a_length_with_the_added_token():
    counts = DraftCounts(10, 40, 12) + DraftCounts(0, 0, 0) - DraftCounts(4, 16, 3)
    assert speculation_metrics(counts) == {
        "rollout/spec_acceptance_rate": 9 / 24,
        "rollout/spec_mean_acceptance_length": 1 + 9 / 6,
    }
    assert speculation_metrics(DraftCounts(0, 0, 0)) == {}
