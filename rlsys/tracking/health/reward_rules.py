"""Rules about rewards and completions."""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.tracking.health.base import (
    NUM_ERRORS,
    SMOOTHED,
    WINDOW,
    EvaluationRow,
    History,
    Reading,
    Rule,
    finite,
)

SAME = 1e-8
LOOK_BACK = 50
"""Steps within which completions that become much longer explode."""
LEAST_STEPS = 15
_NAME = re.compile(r"rewards/(?!correlation/)(.+)/mean")


@dataclass(frozen=True, slots=True)
class NoReward(Rule):
    """No completion of a step has a reward."""

    completions: str
    """The option of `rlsys rewards try` that names the run's completions."""
    name = "no_reward"
    look_at = "The reward functions returned None, or failed and reward.on_error is drop."

    def readings(self, history: History) -> Iterator[Reading]:
        """One."""
        row = history.newest
        reward = row.number("reward")
        if reward is not None:
            says = f"no completion of step {row.step} has a reward, so the step trained nothing."
            alone = f"Try them alone with `rlsys rewards try {self.completions}`."
            yield Reading("reward", reward, math.inf, says, look_at=f"{self.look_at} {alone}")


@dataclass(frozen=True, slots=True)
class DeadReward(Rule):
    """A function gives one value to every completion of many steps."""

    steps: int
    completions: str
    name = "dead_reward"
    look_at = (
        "If that is its best value, the policy has learned it and it may be left out. If not, look "
        "with `rlsys completions` for completions that it should have rewarded."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One for each function."""
        for metric in history.newest.metrics:
            match = _NAME.fullmatch(metric)
            rows = [row for row in history.steps if metric in row.metrics][-self.steps :]
            if match is None or len(rows) < self.steps:
                continue
            means, stds = finite(rows, metric), finite(rows, f"rewards/{match[1]}/std")
            if not len(means) == len(stds) == self.steps:
                continue
            spread = max(*stds, max(means) - min(means))
            says = (
                f"reward function {match[1]!r} gave {means[-1]:g} to every completion of the last "
                f"{self.steps} steps, so it teaches nothing."
            )
            name = shlex.quote(match[1])
            alone = f"Try it alone with `rlsys rewards try {name} {self.completions}`."
            look_at = f"{self.look_at} {alone}"
            metric_of_std = f"rewards/{match[1]}/std"
            yield Reading(metric_of_std, spread, SAME, says, below=True, look_at=look_at)


@dataclass(frozen=True, slots=True)
class PerfectReward(Rule):
    """Nearly every training completion is correct."""

    accuracy: str
    """The function that says so."""
    threshold: float
    name = "perfect_reward"
    look_at = (
        "If held-out prompts are solved as well, there is nothing left to learn: end the run, or "
        "take harder problems. If not, look for an answer that stands in the prompt, for training "
        "rows in few variants, and for a way to please the function without solving the task: "
        "read completions with `rlsys completions`."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One."""
        metric = f"rewards/{self.accuracy}/mean"
        means = history.latest(metric)
        stds = history.latest(f"rewards/{self.accuracy}/std")
        if not len(means) == len(stds) == SMOOTHED:
            return
        # Values within 0 and 1 with mean m have at most the variance m (1 - m).
        spreads = [math.sqrt(max(m * (1 - m), 0)) for m in means]
        is_share = all(
            0 <= m <= 1 and std <= spread * 1.1 + SAME
            for m, std, spread in zip(means, stds, spreads, strict=True)
        )
        value = statistics.fmean(means)
        says = (
            f"reward function {self.accuracy!r} gave {value:.3f} on average to the training "
            f"completions of the last {SMOOTHED} steps."
        )
        yield Reading(metric, value, self.threshold, says, holds=is_share)


@dataclass(frozen=True, slots=True)
class AllAlikeGroups(Rule):
    """The completions of nearly all prompts have equal rewards."""

    threshold: float
    name = "all_alike_groups"
    look_at = (
        "They have no policy gradient: the problems are too easy (rewards at their best) or too "
        "hard. rollout.dynamic_sample and data.difficulty_sampling leave such prompts out; a "
        "higher rollout.temperature or more rollout.num_generations make groups differ."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One."""
        value = history.median("frac_reward_zero_std")
        if value is not None:
            says = (
                f"in {value:.0%} of the groups all completions have the same reward "
                f"(frac_reward_zero_std, the median of the last {SMOOTHED} steps)."
            )
            yield Reading("frac_reward_zero_std", value, self.threshold, says)


@dataclass(frozen=True, slots=True)
class LengthExplosion(Rule):
    """Completions become much longer, and earn nothing by it."""

    factor: float
    name = "length_explosion"
    look_at = (
        "Read the longest completions with `rlsys completions`: repetition, or thinking that does "
        "not end? The rewards repetition and soft_overlong make length cost something, "
        "grpo.loss_type dr_grpo or dapo does not favour long wrong answers."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One."""
        metric = "completions/mean_length"
        rows = list(history.steps)[-LOOK_BACK:]
        if len(rows) < LEAST_STEPS:
            return
        before, now = (finite(part, metric) for part in (rows[:SMOOTHED], rows[-SMOOTHED:]))
        if not len(before) == len(now) == SMOOTHED:
            return
        base, value = statistics.median(before), statistics.median(now)
        says = (
            f"completions have {value:.0f} tokens on average, and had {base:.0f} at step "
            f"{rows[0].step} (medians of {metric}), while the reward has not risen."
        )
        earned = has_risen(finite(rows[:WINDOW], "reward"), finite(rows[-WINDOW:], "reward"))
        yield Reading(metric, value, self.factor * base, says, holds=not earned)


@dataclass(frozen=True, slots=True)
class ClippedCompletions(Rule):
    """Many completions are cut at the longest length."""

    threshold: float
    max_completion_length: int
    name = "clipped_completions"
    look_at = (
        "What is cut rarely earns a reward: raise rollout.max_completion_length, make length cost "
        "something (soft_overlong), or leave cut ones out of the loss "
        "(grpo.mask_truncated_completions). `rlsys completions` shows whether they repeat "
        "themselves or were nearly done."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One."""
        metric = "completions/clipped_ratio"
        value = history.median(metric)
        if value is not None:
            says = (
                f"{value:.0%} of the completions are cut at rollout.max_completion_length = "
                f"{self.max_completion_length} ({metric}, the median of the last {SMOOTHED} steps)."
            )
            yield Reading(metric, value, self.threshold, says)


# --- held-out rows -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Mean:
    """A mean with its standard error."""

    mean: float
    error: float
    row: EvaluationRow


@dataclass(frozen=True, slots=True)
class RewardHacking(Rule):
    """The training reward has risen since the evaluation with the best held-out accuracy, and
    accuracy was lower at the last two evaluations."""

    accuracy: str
    errors: float
    """Standard errors that count."""
    name = "reward_hacking"
    of_evaluations = True
    look_at = (
        "A sign that the policy gets rewards without solving the task: read the best completions "
        "with `rlsys completions`, and see which rewards/<name>/mean rises."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One for each held-out set."""
        for metric, means in accuracies(history, self.accuracy).items():
            if len(means) < 3:
                continue
            *earlier, last, now = means
            best = max(earlier, key=lambda one: one.mean)
            before, after = (rewards_before(history, one.row, "reward") for one in (best, now))
            risen = has_risen(before, after, self.errors)
            margin = self.errors * math.hypot(best.error, now.error)
            fallen_before = best.mean - last.mean > self.errors * math.hypot(best.error, last.error)
            rise = f"from {_mean(before):.3g} to {_mean(after):.3g}"
            says = (
                f"the reward has risen since step {best.row.step}, {rise}, while held-out "
                f"{self.accuracy!r} has fallen from {best.mean:.3g} to {now.mean:.3g}."
            )
            threshold = best.mean - margin
            holds = risen and fallen_before
            yield Reading(metric, now.mean, threshold, says, below=True, holds=holds)


@dataclass(frozen=True, slots=True)
class HeldOutStalls(Rule):
    """Training accuracy rises, and held-out accuracy stays: `RewardHacking` has falls."""

    accuracy: str
    share: float
    """Share of the rise of training accuracy that held-out accuracy stays below."""
    name = "held_out_stalls"
    of_evaluations = True
    look_at = (
        "The policy learns the training prompts and not the task: more and more varied training "
        "data, fewer epochs, and a look at whether both sets are of one kind (`rlsys data "
        "preview`)."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One for each held-out set."""
        for metric, means in accuracies(history, self.accuracy).items():
            if len(means) < 3:
                continue
            first, _, now = means[0], means[-2], means[-1]
            train = f"rewards/{self.accuracy}/mean"
            before, after = (rewards_before(history, one.row, train) for one in (first, now))
            if not before or not after:
                continue
            rise = _mean(after) - _mean(before)
            least_rise = rise - NUM_ERRORS * math.hypot(_error(before), _error(after))
            margin = NUM_ERRORS * math.hypot(first.error, now.error)
            says = (
                f"training {self.accuracy!r} has risen from {_mean(before):.3g} to "
                f"{_mean(after):.3g} since step {first.row.step}, and held-out accuracy only from "
                f"{first.mean:.3g} to {now.mean:.3g}."
            )
            # Bad if even the upper end of what held-out may have risen is a small share.
            threshold = first.mean + self.share * max(least_rise, 0.0) - margin
            best = max(means[:-1], key=lambda one: one.mean)
            fallen = best.mean - now.mean > NUM_ERRORS * math.hypot(best.error, now.error)
            stalled = self._stalled(first, means[-2], least_rise)
            holds = least_rise > 0 and stalled and not fallen
            yield Reading(metric, now.mean, threshold, says, below=True, holds=holds)

    def _stalled(self, first: _Mean, last: _Mean, least_rise: float) -> bool:
        """Whether the evaluation before was below, too."""
        margin = NUM_ERRORS * math.hypot(first.error, last.error)
        return last.mean + margin < first.mean + self.share * least_rise


@dataclass(frozen=True, slots=True)
class Overfitting(Rule):
    """A held-out loss rises while the training loss falls: supervised training."""

    share: float
    name = "overfitting"
    of_evaluations = True
    look_at = (
        "The model memorizes: fewer epochs (num_train_epochs), a lower policy.lr, or more data. "
        "checkpoint.metric_for_best_model with load_best_model_at_end keeps the best model."
    )

    def readings(self, history: History) -> Iterator[Reading]:
        """One for each held-out set."""
        for metric in history.evaluations[-1].metrics:
            if re.fullmatch(r"eval/(?:.+/)?loss", metric) is None:
                continue
            rows = [row for row in history.evaluations if finite([row], metric)]
            if len(rows) < 3:
                continue
            best = min(rows[:-2], key=lambda row: finite([row], metric)[0])
            [lowest], [last], [now] = (finite([row], metric) for row in (best, rows[-2], rows[-1]))
            before, after = (rewards_before(history, row, "loss") for row in (best, rows[-1]))
            fell = bool(before and after) and _mean(after) < _mean(before)
            threshold = lowest * (1 + self.share)
            says = (
                f"{metric} is {now:.4g} after step {rows[-1].step}, and was {lowest:.4g} after "
                f"step {best.step}, while the training loss fell."
            )
            yield Reading(metric, now, threshold, says, holds=fell and last > threshold)


def accuracies(history: History, name: str) -> dict[str, list[_Mean]]:
    """Metric -> the evaluations of a reward function so far, for each set of the newest one."""
    pattern = re.compile(rf"eval/(?:.+/)?rewards/{re.escape(name)}/mean")
    metrics = [m for m in history.evaluations[-1].metrics if pattern.fullmatch(m)]
    found = {m: [_evaluation(row, m) for row in history.evaluations] for m in metrics}
    return {m: [one for one in means if one is not None] for m, means in found.items()}


def _evaluation(row: EvaluationRow, metric: str) -> _Mean | None:
    """A held-out mean; None if the metrics lack it. Its error is the one clustered by prompt, or
    that of independent completions."""
    before, stem = metric.partition("rewards/")[0], metric.removesuffix("/mean")
    names = (metric, f"{stem}/std", f"{before}completions/mean_length")
    values = [row.number(name) for name in (*names, f"{before}num_completion_tokens")]
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    mean, std, length, tokens = (value for value in values if value is not None)
    clustered = row.number(f"{stem}_stderr")
    if clustered is not None and math.isfinite(clustered):
        return _Mean(mean, clustered, row)
    count = max(tokens / max(length, 1.0), 1.0)
    return _Mean(mean, std / math.sqrt(count), row)


def rewards_before(history: History, row: EvaluationRow, metric: str) -> list[float]:
    """A metric in the training steps before an evaluation; of the first steps if none are."""
    return finite(row.before or history.first, metric)


def has_risen(before: Sequence[float], after: Sequence[float], errors: float = NUM_ERRORS) -> bool:
    """Whether a mean has risen by more than noise."""
    if not before or not after:
        return False
    margin = errors * math.hypot(_error(before), _error(after))
    return _mean(after) - _mean(before) > margin


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def completions_option(path: Path | None) -> str:
    """The option of `rlsys rewards try` that names the run's completions."""
    return f"--completions {'FILE' if path is None else shlex.quote(str(path))}"
