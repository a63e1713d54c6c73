"""What configs of runs have in common that train on the rows of their data, and sample nothing."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from rlsys.config.schema import RowsConfig, RunConfig


class MeasuredRowsConfig(RowsConfig):
    """Where rows with a longest length come from."""

    max_length: int = Field(default=2048, ge=2)
    """Longest row, in tokens."""


class RowsRunConfig(RunConfig):
    """A run on rows of data: each step of it is one of the optimizer."""

    default_batch_size: ClassVar[str] = "policy.micro_batch_size x data-parallel ranks"

    data: MeasuredRowsConfig

    @property
    def rows_per_step(self) -> int:
        """Rows per step; null is one forward pass of each data-parallel rank."""
        if self.policy.global_batch_size is not None:
            return self.policy.global_batch_size
        return self.policy.micro_batch_size * self.data_parallel_size

    @property
    def global_batch_size(self) -> int:
        """All of a row's texts, such as both answers of a pair, are rows of a `TrainBatch`."""
        return self.rows_per_step * self.rows_together

    @property
    def optimizer_steps_per_update(self) -> int:
        """A step of the run is one of the optimizer."""
        return 1

    @property
    def longest_row(self) -> int:
        """data.max_length."""
        return self.data.max_length

    @property
    def longest_row_is(self) -> str:
        """The field."""
        return "data.max_length"

    @property
    def max_completion_length(self) -> int:
        """data.max_length: all tokens of a row may be trained on."""
        return self.data.max_length
