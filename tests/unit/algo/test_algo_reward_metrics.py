"""Statistics of each reward function, against TRL's and by properties."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.rollout_metrics import reward_metrics
from rlsys.types import Prompt, RewardOutput, RolloutGroup

NAN = math.nan
VALUES = st.one_of(st.just(NAN), st.floats(-10, 10, width=16))


def groups_of(*groups: list[dict[str, float]], failures=None) -> list[RolloutGroup]:
    prompt = Prompt("p", [], [])
    return [
        RolloutGroup(index, prompt, [], [RewardOutput(0.0, row, failures or {}) for row in group])
        for index, group in enumerate(groups)
    ]


@settings(max_examples=25)
@given(st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=4))
def test_mean_and_std_are_trls(rows):
    utils = pytest.importorskip("trl.trainer.utils")
    metrics = reward_metrics(groups_of(*([{"a": value} for value in row] for row in rows)))
    flat = torch.tensor(rows, dtype=torch.float64).flatten()
    known = int((~flat.isnan()).sum())
    if known == 0:
        assert metrics == {}
        return
    assert metrics["rewards/a/mean"] == pytest.approx(flat.nanmean().item(), abs=1e-9)
    if known > 1:
        assert metrics["rewards/a/std"] == pytest.approx(utils.nanstd(flat).item(), abs=1e-6)


def test_statistics_within_groups_worked():
    groups = groups_of([{"a": 0.0}, {"a": 1.0}, {"a": NAN}], [{"a": 1.0}] * 3, [{"a": NAN}] * 3)
    metrics = reward_metrics(groups)
    assert metrics["rewards/a/group_std"] == pytest.approx(statistics.stdev([0, 1]) / 2)
    assert metrics["rewards/a/frac_zero_std"] == 0.5


def test_correlation_is_of_the_completions_where_both_apply():
    rows = [{"a": 0.0, "b": 3.0}, {"a": 1.0, "b": 1.0}, {"a": NAN, "b": 9.0}, {"a": 2.0, "b": -1.0}]
    metrics = reward_metrics(groups_of(rows))
    assert metrics["rewards/correlation/a/b"] == pytest.approx(-1.0)
    constant = [{**row, "b": 1.0} for row in rows]
    assert not any("correlation" in key for key in reward_metrics(groups_of(constant)))


def test_failures_are_counted_by_kind():
    groups = groups_of([{"a": 0.0}] * 2, failures={"a": "timeout"})
    groups += groups_of([{"a": NAN}] * 3, failures={"a": "crashed"})
    metrics = reward_metrics(groups)
    assert metrics["rewards/a/timeouts"] == 2
    assert metrics["rewards/a/crashes"] == 3
    assert "rewards/a/errors" not in metrics


def test_one_completion_a_group_has_no_statistics_within_groups():
    metrics = reward_metrics(groups_of([{"a": 1.0}], [{"a": 0.0}]))
    assert set(metrics) == {"rewards/a/mean", "rewards/a/std"}
