"""The section `data` of supervised training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rlsys.config.rows_run import MeasuredRowsConfig
from rlsys.config.schema import NonEmptyText


class SftDataConfig(MeasuredRowsConfig):
    """Where samples come from."""

    max_length: int = Field(default=2048, ge=2)
    """Longest sample, in tokens; see `truncation_strategy`. The default is less for a model with
    fewer positions."""
    truncation_strategy: Literal["auto", "delete", "left", "right", "split", "error"] = "auto"
    """What happens to rows over `max_length`. delete: dropped and counted; left, right: tokens are
    cut off at this side; split: a text becomes several samples, with sft.objective pretrain only;
    error: the run does not start. auto: delete, and split with sft.objective pretrain."""
    max_eval_samples: PositiveInt | None = None
    """Held-out samples to evaluate on, in each set; the first ones are taken. null takes all."""
    model_name: list[NonEmptyText] = Field(default=[], max_length=2)
    """What {{NAME}} in a row becomes (self-cognition data): one name, or one for rows with the tag
    zh and one for the tag en."""
    model_author: list[NonEmptyText] = Field(default=[], max_length=2)
    """What {{AUTHOR}} in a row becomes, in the same way."""
