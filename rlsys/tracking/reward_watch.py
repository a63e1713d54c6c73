"""Three ways in which rewards go wrong that nobody sees in a table of numbers, told once each."""

from __future__ import annotations

import math
import re
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

from rlsys.tracking.base import Metrics, is_evaluation

DEAD_STEPS = 20
"""So many steps in a row with one and the same value make a reward dead."""
WINDOW_STEPS = 10
"""Training steps whose mean is compared at two evaluations."""
NUM_ERRORS = 2.0
"""Standard errors by which something has to change, so that noise is no warning."""
SAME = 1e-8

_NAME = re.compile(r"rewards/(?!correlation/)(.+)/mean")


@dataclass(frozen=True, slots=True)
class _Evaluation:
    step: int
    mean: float
    error: float
    """Standard error of the mean."""


class RewardWatch:
    """Looks at the metrics of a run and says what a person should look into.

    - No reward: not one completion of a step has any, so nothing was trained.
    - A dead reward: one value for every completion of `DEAD_STEPS` steps in a row.
    - A sign of reward hacking: the reward of training has risen since the evaluation at which
      held-out accuracy was best, and at two evaluations in a row that accuracy was lower.
      Accuracy is the reward function with accuracy in its name, else the first one.

    It knows the steps of this process only; after a resume it starts anew.
    """

    def __init__(self, reward_funcs: list[str], completions: Path | None = None):
        """`completions` is the run's file of them; None: it writes none."""
        file = "FILE" if completions is None else shlex.quote(str(completions))
        self._completions = f"--completions {file}"
        named = [name for name in reward_funcs if "accuracy" in name]
        self._accuracy = (named or reward_funcs)[0]
        self._constant: dict[str, tuple[float, int]] = {}
        """Function -> its value and for how many steps it has been the same."""
        self._rewards: dict[int, float] = {}
        self._evaluations: list[_Evaluation] = []
        self._told: set[str] = set()

    def observe(self, step: int, metrics: Metrics) -> list[str]:
        """Take the metrics of a step or an evaluation; returns the warnings that are new."""
        if is_evaluation(metrics):
            return self._once("hacking", self._hacking(step, metrics))
        warnings: list[str] = []
        reward = metrics.get("reward")
        if isinstance(reward, float) and math.isfinite(reward):
            self._rewards[step] = reward
        elif isinstance(reward, float):
            warnings += self._once("no reward", self._no_reward(step))
        for key in metrics:
            if match := _NAME.fullmatch(key):
                warnings += self._once(f"dead {match[1]}", self._dead(match[1], metrics))
        return warnings

    def _once(self, topic: str, warning: str | None) -> list[str]:
        if warning is None or topic in self._told:
            return []
        self._told.add(topic)
        return [warning]

    def _dead(self, name: str, metrics: Metrics) -> str | None:
        mean, std = metrics[f"rewards/{name}/mean"], metrics.get(f"rewards/{name}/std")
        assert not isinstance(mean, str)
        if not isinstance(std, float) or not std < SAME:
            self._constant.pop(name, None)
            return None
        value, steps = self._constant.get(name, (mean, 0))
        steps = steps + 1 if abs(value - mean) < SAME else 1
        self._constant[name] = (mean, steps)
        if steps < DEAD_STEPS:
            return None
        return (
            f"reward function {name!r} gave {mean:g} to every completion of the last {DEAD_STEPS} "
            "steps, so it teaches nothing. If that is its best value, it is learned and may be "
            "left out; if not, look with `rlsys completions` at what it should have paid for, and "
            f"try it alone with `rlsys rewards try {shlex.quote(name)} {self._completions}`."
        )

    def _no_reward(self, step: int) -> str:
        return (
            f"no completion of step {step} has a reward, so the step trained nothing: the reward "
            "functions returned None for all of them, or failed where reward.on_error is drop. Try "
            f"them alone with `rlsys rewards try {self._completions}`. This is said once."
        )

    def _hacking(self, step: int, metrics: Metrics) -> str | None:
        evaluation = _evaluation(step, metrics, self._accuracy)
        if evaluation is None:
            return None
        self._evaluations.append(evaluation)
        if len(self._evaluations) < 3:
            return None
        *earlier, last, now = self._evaluations
        best = max(earlier, key=lambda evaluation: evaluation.mean)
        before, after = self._window(best.step), self._window(now.step)
        fallen = _is_below(last, best) and _is_below(now, best)
        if not (fallen and _has_risen(before, after)):
            return None
        return (
            f"the reward has risen since step {best.step}, from {statistics.fmean(before):.3g} to "
            f"{statistics.fmean(after):.3g}, while held-out {self._accuracy!r} has fallen from "
            f"{best.mean:.3g} to {now.mean:.3g}: a sign that the policy has found a way to be paid "
            "without solving the task. Read the best completions with `rlsys completions`, and "
            "see which of the rewards/<name>/mean rises."
        )

    def _window(self, step: int) -> list[float]:
        """The rewards of the training steps up to `step`, or of the first ones."""
        steps = sorted(self._rewards)
        until = [s for s in steps if s <= step][-WINDOW_STEPS:]
        return [self._rewards[s] for s in until or steps[:WINDOW_STEPS]]


def _evaluation(step: int, metrics: Metrics, name: str) -> _Evaluation | None:
    """Of reward function `name`; None where the metrics do not have it."""
    keys = ["completions/mean_length", "num_completion_tokens"]
    keys += [f"rewards/{name}/mean", f"rewards/{name}/std"]
    values = [metrics.get(f"eval/{key}", math.nan) for key in keys]
    length, tokens, mean, std = (math.nan if isinstance(x, str) else x for x in values)
    if not math.isfinite(mean + std + tokens / max(length, 1.0)):
        return None
    num_completions = max(tokens / max(length, 1.0), 1.0)
    return _Evaluation(step, mean, std / math.sqrt(num_completions))


def _is_below(later: _Evaluation, best: _Evaluation) -> bool:
    return best.mean - later.mean > NUM_ERRORS * math.hypot(best.error, later.error)


def _has_risen(before: list[float], after: list[float]) -> bool:
    if not before or not after:
        return False
    error = math.hypot(*(_standard_error(window) for window in (before, after)))
    return statistics.fmean(after) - statistics.fmean(before) > NUM_ERRORS * error


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
