"""What a rule is: it reads a value from the rows of metrics, and says from where on it warns."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from rlsys.tracking.base import Metrics

SMOOTHED = 5
"""Steps whose median stands for "now": one odd step is not a trend."""
WINDOW = 10
"""Training steps before an evaluation with which it is compared; the first steps of a run."""
KEPT = 200
"""Steps, and evaluations, that rules can look back."""
NUM_ERRORS = 2.0
"""Standard errors that count as a change and not as noise."""


@dataclass(frozen=True, slots=True)
class Row:
    """The metrics of a training step, or of an evaluation after it."""

    step: int
    metrics: Metrics

    def number(self, name: str) -> float | None:
        """A metric; None where it is missing. Files have null for NaN."""
        value = self.metrics.get(name, "")
        if isinstance(value, str):
            return None
        return math.nan if value is None else float(value)


@dataclass(frozen=True, slots=True)
class EvaluationRow(Row):
    """An evaluation, with the training steps before it."""

    before: tuple[Row, ...] = ()
    """The last `WINDOW`; empty before the first step."""


@dataclass(slots=True)
class History:
    """The rows that rules read."""

    first: list[Row] = field(default_factory=list)
    """The first `WINDOW` training steps of the run."""
    steps: deque[Row] = field(default_factory=lambda: deque(maxlen=KEPT))
    """The latest training steps, the newest last."""
    evaluations: deque[EvaluationRow] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, step: int, metrics: Metrics, *, is_evaluation: bool) -> None:
        """Take the metrics of a training step or an evaluation."""
        if is_evaluation:
            before = tuple(self.steps)[-WINDOW:]
            self.evaluations.append(EvaluationRow(step, metrics, before))
            return
        row = Row(step, metrics)
        if len(self.first) < WINDOW:
            self.first.append(row)
        self.steps.append(row)

    def latest(self, name: str, count: int = SMOOTHED, *, skip: int = 0) -> list[float]:
        """The finite values of a metric in the newest `count` steps that have it, oldest first,
        without the newest `skip`; fewer if the run has not so many."""
        found: list[float] = []
        for row in reversed(self.steps):
            value = row.number(name)
            if value is not None and math.isfinite(value):
                found.append(value)
                if len(found) == count + skip:
                    break
        return found[skip:][::-1]

    def median(self, name: str, count: int = SMOOTHED) -> float | None:
        """The median of `latest`; None if fewer than `count` steps have the metric."""
        values = self.latest(name, count)
        return statistics.median(values) if len(values) == count else None

    @property
    def newest(self) -> Row:
        """The newest training step."""
        return self.steps[-1]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rule reads: a value, the bound that it should not pass, and what passing means."""

    metric: str
    value: float
    threshold: float
    says: str
    """What was found, as a sentence."""
    below: bool = False
    """Whether values below the threshold are bad, and not those above."""
    holds: bool = True
    """Whether what else has to be true for the warning to begin is true."""
    look_at: str | None = None
    """What to do about this metric; None: what the rule says."""
    ends: str | None = None
    """Why the run ends, whatever `tracking.stop_on` says; None: it goes on."""

    def is_beyond(self, threshold: float) -> bool:
        """Whether the value is on the bad side of a threshold, as NaN always is."""
        fine = self.value >= threshold if self.below else self.value <= threshold
        return not fine


class Rule(ABC):
    """Looks for one kind of problem. It keeps no state: the same rows give the same readings."""

    name: ClassVar[str]
    """The name of the warning and of its field in `tracking.health`."""
    look_at: ClassVar[str]
    """What a person should look at, in sentences."""
    of_evaluations: ClassVar[bool] = False
    """Whether it reads evaluations, and not training steps."""

    @abstractmethod
    def readings(self, history: History) -> Iterator[Reading]:
        """What the newest row shows, one for each metric; nothing where it has no such metric."""


def finite(rows: Iterable[Row], name: str) -> list[float]:
    """The values of a metric that are finite numbers."""
    values = [row.number(name) for row in rows]
    return [value for value in values if value is not None and math.isfinite(value)]
