"""Statistics of evaluations against enumeration, tables and torch."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algo.evaluation import (
    estimate,
    majority_vote,
    paired_difference,
    pass_at_k,
    student_t_tails,
)


@given(
    st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case):
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_1_is_the_share_of_correct_samples():
    assert pass_at_k(10_000, 37, 1) == pytest.approx(0.0037)


def test_pass_at_k_is_what_the_papers_own_code_gives():
    # 1 - prod(1 - k / i for i in n - c + 1 ... n), the numerically stable form of the paper.
    n, c, k = 200, 13, 100
    product = math.prod(1 - k / i for i in range(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(1 - product, rel=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "vote"),
    [
        (["4", "4", "5"], [1, 1, 0], 1.0),
        (["4", "5", "5"], [1, 0, 0], 0.0),
        (["4", "5"], [1, 0], 0.5),  # a tie is broken by a coin
        (["4", None, None, None], [1, 0, 0, 0], 1.0),
        ([None, None], [0, 1], None),
        (["4", "4"], [1, 0], 0.5),
    ],
)
def test_the_majority(answers, correct, vote):
    assert majority_vote(answers, correct) == vote


# --- errors --------------------------------------------------------------------------------------

NUMBERS = st.floats(-10, 10)


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(NUMBERS, min_size=n, max_size=n), min_size=2)
    )
)
def test_with_equally_many_samples_the_error_is_that_of_the_means_of_prompts(values):
    means = [statistics.fmean(samples) for samples in values]
    found = estimate(values)
    assert found.mean == pytest.approx(statistics.fmean(means), abs=1e-9)
    expected = statistics.stdev(means) / math.sqrt(len(means))
    assert found.stderr == pytest.approx(expected, abs=1e-7)
    assert found.num_prompts == len(values)


def test_equal_samples_of_a_prompt_do_not_make_the_error_smaller():
    few = [[0.0], [1.0], [1.0], [0.0]]
    many = [samples * 100 for samples in few]
    assert estimate(many).stderr == pytest.approx(estimate(few).stderr)


def test_missing_values_are_left_out():
    found = estimate([[1.0, math.nan], [0.0, 0.0], [math.nan]])
    assert (found.mean, found.num_prompts) == (pytest.approx(1 / 3), 2)
    assert str(estimate([[math.nan]])) == "-"
    assert str(estimate([[0.5, 1.0]])) == "0.750"


# --- differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.706), (4, 2.776), (9, 2.262), (29, 2.045), (100, 1.984), (9999, 1.960)],
)
def test_the_t_distribution_is_that_of_the_tables(degrees, t):
    assert student_t_tails(t, degrees) == pytest.approx(0.05, abs=1e-4)
    assert student_t_tails(-t, degrees) == student_t_tails(t, degrees)


@given(st.floats(0.01, 30), st.sampled_from([1, 2]))
def test_the_t_distribution_in_closed_form(t, degrees):
    # 1 degree is Cauchy's distribution; 2 degrees have an algebraic one.
    closed = {1: 1 - 2 / math.pi * math.atan(t), 2: 1 - t / math.sqrt(2 + t * t)}[degrees]
    assert student_t_tails(t, degrees) == pytest.approx(closed, rel=1e-9, abs=1e-12)


def test_with_many_degrees_it_is_the_normal_distribution():
    for t in (0.1, 1.0, 2.5, 5.0):
        normal = math.erfc(t / math.sqrt(2))
        assert student_t_tails(t, 10**7) == pytest.approx(normal, rel=1e-4)


def test_a_known_paired_test():
    # Student's own data (1908): hours of sleep with two drugs, t = 4.0621, p = 0.002833.
    a = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    b = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(1.58)
    assert found.mean / found.stderr == pytest.approx(4.0621, abs=1e-4)
    assert found.p_value == pytest.approx(0.002833, abs=1e-6)
    interval = (found.mean - found.margin, found.mean + found.margin)
    assert interval == pytest.approx((0.7001142, 2.4598858), abs=1e-6)


def test_noise_alone_is_called_a_difference_as_often_as_it_should():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 2, 20, generator=generator, dtype=torch.float64).tolist()
    found = [paired_difference(a, b) for a, b in draws]
    assert sum(one.p_value < 0.05 for one in found) / len(found) == pytest.approx(0.05, abs=0.015)
    outside = sum(abs(one.mean) > one.margin for one in found)
    assert outside == sum(one.p_value < 0.05 for one in found)


def test_pairs_without_scatter_or_values():
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert paired_difference([0.0, 0.0], [1.0, 1.0]).p_value == 0.0
    alone = paired_difference([0.0, math.nan], [1.0, 1.0])
    assert (alone.mean, alone.num_prompts) == (1.0, 1)
    assert math.isnan(alone.p_value)
