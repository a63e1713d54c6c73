"""The health of a run: rules look at each row of metrics, and each problem is said once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.problems import TrainingStopped
from rlsys.tracking.base import HealthWarning, Metrics, is_evaluation
from rlsys.tracking.health.base import History, Reading, Rule

CALM_STEPS, CALM_EVALUATIONS = 20, 2
"""Rows in a row without the problem after which it is over: what comes and goes is one problem."""
NO_ADVANTAGE = 1e-8
"""Advantages up to this size count as 0."""


@dataclass(slots=True)
class _Active:
    """A problem that has begun."""

    begun: Reading
    step: int
    calm: int = 0
    """Rows since it was last seen."""


class Health:
    """Reads every row of metrics; warns when a problem begins, and when it is over.

    Args:
        rules: what to look for.
        stop_on: names of warnings that end the run.
    """

    def __init__(self, rules: Sequence[Rule], stop_on: Collection[str] = ()):
        self._rules = rules
        self._stop_on = stop_on
        self._history = History()
        self._active: dict[tuple[str, str], _Active] = {}
        self._why_stopped: str | None = None
        self._steps_here: list[int] = []
        """First and last step that `observe` saw."""
        self._has_advantages = False

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take the rows of metrics.jsonl before a resume: what had begun is not said again."""
        for row in rows:
            metrics = {name: value for name, value in row.items() if name != "step"}
            self._look(row["step"], metrics)

    def observe(self, step: int, metrics: Metrics) -> list[HealthWarning]:
        """Take the metrics of a step or an evaluation; returns what begins or is over with it."""
        if not is_evaluation(metrics):
            self._steps_here = [*self._steps_here[:1], step]
            advantage = metrics.get("advantages/abs_max")
            self._has_advantages |= not isinstance(advantage, float) or advantage > NO_ADVANTAGE
        return self._look(step, metrics, may_stop=True)

    def raise_if_stopped(self) -> None:
        """End the run if a warning of the last `observe` ends it.

        Raises:
            TrainingStopped: it does.
        """
        if self._why_stopped is not None:
            raise TrainingStopped(self._why_stopped)

    def nothing_learned(self) -> str | None:
        """That no step of this process had an advantage, so that rewards taught nothing; None if
        one had."""
        if self._has_advantages or not self._steps_here:
            return None
        return (
            f"nothing was learned from rewards: in no step from {self._steps_here[0]} to "
            f"{self._steps_here[-1]} did a group have completions with different rewards "
            "(frac_reward_zero_std): all problems are too hard or too easy, or a reward function "
            "does not see what it should reward. Read them with `rlsys completions`."
        )

    def _look(self, step: int, metrics: Metrics, *, may_stop: bool = False) -> list[HealthWarning]:
        evaluated = is_evaluation(metrics)
        self._history.add(step, metrics, is_evaluation=evaluated)
        found: list[HealthWarning] = []
        for rule in self._rules:
            if rule.of_evaluations != evaluated:
                continue
            for reading in rule.readings(self._history):
                if (warning := self._changed(step, rule, reading)) is not None:
                    found.append(warning)
                if may_stop:
                    self._may_stop(rule, reading, warning)
        return found

    def _changed(self, step: int, rule: Rule, reading: Reading) -> HealthWarning | None:
        """The warning of a problem that begins or is over with a reading."""
        key = rule.name, reading.metric
        active = self._active.get(key)
        if active is None:
            if not (reading.holds and reading.is_beyond(reading.threshold)):
                return None
            self._active[key] = _Active(reading, step)
            about = (reading.metric, reading.value, reading.threshold)
            look_at = reading.look_at or rule.look_at
            return HealthWarning(step, rule.name, *about, reading.says, look_at)
        threshold = active.begun.threshold  # what it is measured by may have followed the problem
        if reading.is_beyond(threshold):
            active.calm = 0
            return None
        active.calm += 1
        if active.calm < (CALM_EVALUATIONS if rule.of_evaluations else CALM_STEPS):
            return None
        del self._active[key]
        says = (
            f"{rule.name}, which began at step {active.step}, is over: {reading.metric} is "
            f"{reading.value:.3g}."
        )
        return HealthWarning(
            step, rule.name, reading.metric, reading.value, threshold, says, "", event="end"
        )

    def _may_stop(self, rule: Rule, reading: Reading, warning: HealthWarning | None) -> None:
        if reading.ends is not None:
            self._why_stopped = reading.ends
        elif warning is not None and warning.event == "begin" and rule.name in self._stop_on:
            self._why_stopped = (
                f"{warning.text} tracking.stop_on names {rule.name}, so the run ends; "
                "--checkpoint.resume goes on from here, and does not stop at it again."
            )
