"""What reward functions log besides their values: TRL's `log_extra` and `log_metric`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from rlsys.text import counted


@dataclass(frozen=True, slots=True)
class Logged:
    """What one call of a function logged about one completion."""

    extra: dict[str, Any] = field(default_factory=dict)
    """JSON value by column."""
    metrics: dict[str, float] = field(default_factory=dict)


class CallLog:
    """The `log_extra` and `log_metric` of one call."""

    def __init__(self, num_completions: int):
        self._num_completions = num_completions
        self._extra: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add values to a column of completions.jsonl."""
        self._extra.setdefault(str(column), []).extend(_plain(value) for value in values)

    def log_metric(self, name: str, value: Any) -> None:
        """Add a value to a metric, the mean of a step's values."""
        number = float(value)
        if math.isfinite(number):  # a NaN would be the mean of the whole step
            self._metrics.setdefault(str(name), []).append(number)

    def per_completion(self) -> list[Logged]:
        """What was logged about each completion; [] if nothing.

        Raises:
            ValueError: a column without one value for each completion.
        """
        for column, values in self._extra.items():
            if len(values) != self._num_completions:
                raise ValueError(
                    f"log_extra({column!r}, ...) got {counted(len(values), 'value')} for "
                    f"{counted(self._num_completions, 'completion')}: give one for each, in order"
                )
        if not self._extra and not self._metrics:
            return []
        metrics = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        return [
            Logged({column: values[index] for column, values in self._extra.items()}, metrics)
            for index in range(self._num_completions)
        ]


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    for method in ("item", "tolist"):  # of numpy and torch: a number, an array
        if hasattr(value, method):
            try:
                value = getattr(value, method)()
                break
            except (TypeError, ValueError, RuntimeError):
                continue  # item() of several values
    if isinstance(value, Real) and not isinstance(value, bool | int):
        value = float(value)
        return value if math.isfinite(value) else None
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
