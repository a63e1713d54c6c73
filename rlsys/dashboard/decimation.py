"""Fewer points for a chart, with every spike."""

from __future__ import annotations

import numpy as np


def rows_to_show(columns: list[np.ndarray], points: int) -> np.ndarray:
    """The rows that a chart of at most `points` points shows.

    The rows are cut into buckets. Each keeps, for every column, the row with the least and the row
    with the greatest value, so that no spike is lost. The first and the last row are kept, and the
    last row in which a column has a value. So a chart shows real steps and real values only.

    Args:
        columns: [rows] each, all equally long; NaN where a row has no value.
        points: the most rows that come back; at least 2 and 3 for each column always do.

    Returns:
        indices of rows, ascending.
    """
    rows = len(columns[0]) if columns else 0
    if rows <= points:
        return np.arange(rows)
    always = [0, rows - 1]
    for column in columns:
        has_value = np.flatnonzero(~np.isnan(column))
        always += has_value[-1:].tolist()
    buckets = max(1, (points - len(always)) // (2 * len(columns)))
    edges = np.linspace(0, rows, buckets + 1).astype(np.int64)
    starts, ends = edges[:-1], edges[1:]
    width = int((ends - starts).max())
    # All buckets as one table: short ones repeat their last row, which changes no extreme.
    table = np.minimum(starts[:, None] + np.arange(width), ends[:, None] - 1)
    kept = [np.array(always, dtype=np.int64)]
    for column in columns:
        values = column[table]
        is_empty = np.isnan(values).all(axis=1)
        for sign in (1, -1):
            where = np.where(np.isnan(values), np.inf, sign * values).argmin(axis=1)
            kept.append(table[np.arange(buckets), where][~is_empty])
    return np.unique(np.concatenate(kept))
