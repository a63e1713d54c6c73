"""Warnings of rewards that go wrong in ways that a table of numbers does not show."""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlsys.tracking.base import Metrics, is_evaluation
from rlsys.tracking.watch import Watch

DEAD_STEPS = 20
"""A reward is dead after this many steps in a row with one value."""
WINDOW_STEPS = 10
"""Training steps before an evaluation whose mean reward is compared."""
NUM_ERRORS = 2.0
"""Standard errors that count as a change and not as noise."""
SAME = 1e-8

_NAME = re.compile(r"rewards/(?!correlation/)(.+)/mean")


@dataclass(frozen=True, slots=True)
class _Evaluation:
    step: int
    mean: float
    error: float
    """Standard error of the mean."""


class RewardWatch(Watch):
    """Warns of three problems with rewards.

    - No reward: no completion of a step has a reward, so nothing was trained.
    - A dead reward: a function gave one value to every completion of `DEAD_STEPS` steps in a row.
    - A sign of reward hacking: the training reward has risen since the evaluation with the best
      held-out accuracy, and accuracy was lower at the last two evaluations. Accuracy is the reward
      function with "accuracy" in its name, else the first one.

    Args:
        reward_funcs: names of the reward functions.
        completions: the run's completions.jsonl or None, for commands in warnings.
    """

    def __init__(self, reward_funcs: list[str], completions: Path | None = None):
        super().__init__()
        file = "FILE" if completions is None else shlex.quote(str(completions))
        self._completions = f"--completions {file}"
        named = [name for name in reward_funcs if "accuracy" in name]
        self._accuracy = (named or reward_funcs)[0]
        self._constant: dict[str, tuple[float, int]] = {}
        """Reward function -> its value, and for how many steps it has been the same."""
        self._rewards: dict[int, float] = {}
        self._evaluations: list[_Evaluation] = []

    def _find(self, step: int, metrics: Metrics) -> Iterator[tuple[str, str]]:
        if is_evaluation(metrics):
            if (warning := self._hacking(step, metrics)) is not None:
                yield "hacking", warning
            return
        reward = metrics.get("reward")
        if isinstance(reward, float) and math.isfinite(reward):
            self._rewards[step] = reward
        elif isinstance(reward, float):
            yield "no reward", self._no_reward(step)
        for key in metrics:
            if match := _NAME.fullmatch(key):
                name = match[1]
                if (warning := self._dead(name, metrics)) is not None:
                    yield f"dead {name}", warning

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
            "steps, so it teaches nothing. If that is its best value, the policy has learned it "
            "and it may be left out. If not, look with `rlsys completions` for completions that it "
            "should have rewarded, and try it alone with "
            f"`rlsys rewards try {shlex.quote(name)} {self._completions}`."
        )

    def _no_reward(self, step: int) -> str:
        return (
            f"no completion of step {step} has a reward, so the step trained nothing: the reward "
            "functions returned None for all of them, or failed and reward.on_error is drop. Try "
            f"them alone with `rlsys rewards try {self._completions}`. This warning comes once."
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
            f"{best.mean:.3g} to {now.mean:.3g}: a sign that the policy gets rewards without "
            "solving the task. Read the best completions with `rlsys completions`, and see which "
            "rewards/<name>/mean rises."
        )

    def _window(self, step: int) -> list[float]:
        """Rewards of the last training steps up to `step`; of the first steps if there are none."""
        steps = sorted(self._rewards)
        until = [s for s in steps if s <= step][-WINDOW_STEPS:]
        return [self._rewards[s] for s in until or steps[:WINDOW_STEPS]]


def _evaluation(step: int, metrics: Metrics, name: str) -> _Evaluation | None:
    """The evaluation of reward function `name`; None if the metrics lack it."""
    keys = ["completions/mean_length", "num_completion_tokens"]
    keys += [f"rewards/{name}/mean", f"rewards/{name}/std"]
    values = [metrics.get(f"eval/{key}", math.nan) for key in keys]
    length, tokens, mean, std = (math.nan if isinstance(x, str) else x for x in values)
    if not math.isfinite(mean + std + tokens / max(length, 1.0)):
        return None
    num_completions = max(tokens / max(length, 1.0), 1.0)
    clustered = metrics.get(f"eval/rewards/{name}_stderr", math.nan)
    if isinstance(clustered, float) and math.isfinite(clustered):
        return _Evaluation(step, mean, clustered)
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
