"""Fewer points for a chart: what may not get lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlsys.dashboard.decimation import rows_to_show

values = st.one_of(st.floats(-1e6, 1e6), st.just(np.nan))


@st.composite
def charts(draw):
    rows = draw(st.integers(1, 400))
    columns = [
        draw(arrays(np.float64, rows, elements=values, fill=st.just(0.5)))
        for _ in range(draw(st.integers(1, 4)))
    ]
    return columns, draw(st.integers(2, 200))


@given(charts())
def test_extremes_and_the_last_value_of_each_column_are_kept(chart):
    columns, points = chart
    rows = rows_to_show(columns, points)
    for column in columns:
        shown = column[rows]
        if np.isnan(column).all():
            continue
        assert np.nanmin(shown) == np.nanmin(column)
        assert np.nanmax(shown) == np.nanmax(column)
        assert shown[~np.isnan(shown)][-1] == column[~np.isnan(column)][-1]


@given(charts())
def test_rows_are_in_order_few_and_hold_both_ends(chart):
    columns, points = chart
    rows = rows_to_show(columns, points)
    assert (np.diff(rows) > 0).all()
    assert (rows[0], rows[-1]) == (0, len(columns[0]) - 1)
    assert len(rows) <= max(points, 2 + 3 * len(columns))
    if len(columns[0]) <= points:
        assert len(rows) == len(columns[0])


@given(st.integers(0, 9_999), st.integers(0, 9_999))
def test_a_spike_of_one_step_stays_at_its_step(up, down):
    column = np.sin(np.arange(10_000) / 100)
    column[down] = -50
    column[up] = 50
    rows = rows_to_show([column, np.zeros(10_000)], 500)
    assert up in rows
    assert down in rows or down == up


def test_the_points_are_used():
    columns = [np.random.default_rng(i).normal(size=100_000) for i in range(3)]
    assert 1_500 < len(rows_to_show(columns, 2_000)) <= 2_000


@pytest.mark.parametrize("columns", [[], [np.array([])]])
def test_nothing_is_nothing(columns):
    assert rows_to_show(columns, 10).tolist() == []
