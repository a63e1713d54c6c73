"""What a teacher says of each token that is trained on, on its way to the policy's micro-batches.

Hidden states of the teacher travel, not logits: with a vocabulary of 152k and 3,584 hidden numbers
they are a fortieth. Tokens of prompts have none. Rows are NumPy arrays, which Ray shares among
processes without a copy; NumPy has no bfloat16, so its bits travel as int16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlsys.types import TeacherRows, TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = ("hidden", "top_ids", "top_logprobs")
"""Of TeacherRows, and with `teacher_` before them of PackedMicroBatch."""


def to_array(values: Tensor) -> np.ndarray:
    """A tensor on any device as an array that Ray shares."""
    values = values.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    return values.numpy()


def from_array(array: np.ndarray) -> Tensor:
    """The tensor that `to_array` took, on the array's memory."""
    values = torch.from_numpy(array)
    return values.view(torch.bfloat16) if values.dtype == torch.int16 else values


def num_targets(batch: TrainBatch, row: int) -> int:
    """Tokens of a row that are trained on; the first one never is, nothing predicts it."""
    return int(batch.completion_mask[row, 1:].sum())


def split_rows(
    packed: Sequence[dict[str, Tensor]], batch: TrainBatch, rows: Sequence[int]
) -> TeacherRows:
    """The rows of a data-parallel rank, from what its micro-batches returned of their targets.

    Args:
        packed: values of each micro-batch, [L, ...], by a field of TeacherRows.
        batch: has the targets.
        rows: the rows of all micro-batches, in their order.
    """
    counts = [num_targets(batch, row) for row in rows]
    found: dict[str, list[np.ndarray]] = {}
    for name in packed[0]:
        whole = to_array(torch.cat([values[name] for values in packed]))
        assert len(whole) == sum(counts), (len(whole), counts)
        found[name] = np.split(whole, np.cumsum(counts)[:-1])
    return TeacherRows(**found)


def join_rows(parts: Sequence[tuple[Sequence[int], TeacherRows]], num_rows: int) -> TeacherRows:
    """All rows of a batch in their order, from the ranks' parts."""
    joined: dict[str, list[np.ndarray]] = {}
    for name in FIELDS:
        by_row: dict[int, np.ndarray] = {}
        for rows, part in parts:
            arrays: list[np.ndarray] = getattr(part, name)
            if arrays:  # a teacher gives hidden states, or its likeliest tokens
                by_row |= zip(rows, arrays, strict=True)
        if by_row:
            joined[name] = [by_row[row] for row in range(num_rows)]
    return TeacherRows(**joined)


def pack_teacher(batch: TrainBatch, rows: Sequence[int]) -> dict[str, Tensor]:
    """Fields of PackedMicroBatch for some rows of a batch; {} without a teacher.

    A row that trains nothing, such as one that is repeated, has no tokens here.
    """
    if batch.teacher is None:
        return {}
    fields: dict[str, Tensor] = {}
    trained = [row for row in rows if num_targets(batch, row)]
    for name in FIELDS:
        arrays: list[np.ndarray] = getattr(batch.teacher, name)
        if not arrays:
            continue
        for row in trained:
            assert len(arrays[row]) == num_targets(batch, row), (row, len(arrays[row]))
        parts = [arrays[row] for row in trained] or [arrays[0][:0]]
        fields[f"teacher_{name}"] = from_array(np.concatenate(parts))
    return fields
