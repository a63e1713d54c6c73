"""The output of a run: a table and a progress bar on a terminal, else plain lines."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlsys.config import PreferenceConfig, RewardModelConfig, RunConfig
from rlsys.log_files import LogFile
from rlsys.tracking.base import Metrics, Split, Tracker, is_evaluation
from rlsys.tracking.columns import join_wrapped
from rlsys.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class Column:
    """One number of the step line."""

    header: str
    """Above the column on a terminal, before the number elsewhere."""
    name: str
    """Name of the metric."""
    format: str
    width: int


COLUMNS = [
    Column("reward", "reward", ".3f", 7),
    Column("std", "reward_std", ".3f", 6),
    Column("length", "completions/mean_length", ".0f", 6),
    Column("clipped", "completions/clipped_ratio", ".3f", 7),
    Column("kl", "kl", ".4f", 7),
    Column("loss", "loss", ".2e", 9),
    Column("s/step", "time/step", ".1f", 6),
    Column("tok/s", "rollout/tokens_per_second", ".0f", 6),
    Column("logp diff", "sampling/logp_difference/mean", ".1e", 9),
    Column("grad", "grad_norm", ".3g", 7),
    Column("zero-std", "frac_reward_zero_std", ".2f", 8),
    Column("lr", "learning_rate", ".2g", 7),
]
"""In order of importance: a terminal shows the first columns that fit."""
SFT_COLUMNS = [
    Column("loss", "loss", ".4f", 8),
    Column("s/step", "time/step", ".2f", 6),
    Column("tok/s", "tokens_per_second", ".0f", 7),
    Column("grad", "grad_norm", ".3g", 7),
    Column("lr", "learning_rate", ".2g", 7),
    Column("epoch", "epoch", ".2f", 6),
]
"""The same, of supervised training."""
PREFERENCE_COLUMNS = [
    SFT_COLUMNS[0],
    Column("accuracy", "rewards/accuracies", ".3f", 8),
    Column("margin", "rewards/margins", ".3f", 7),
    *SFT_COLUMNS[1:],
]
"""The same, of preference training."""
REWARD_MODEL_COLUMNS = [
    SFT_COLUMNS[0],
    Column("accuracy", "accuracy", ".3f", 8),
    Column("margin", "margin", ".3f", 7),
    *SFT_COLUMNS[1:],
]
"""The same, of reward models and classifiers."""
ROWS_BETWEEN_HEADERS = 20


def columns_of(config: RunConfig) -> list[Column]:
    """What a line of a run shows."""
    if isinstance(config, PreferenceConfig):
        return PREFERENCE_COLUMNS
    if isinstance(config, RewardModelConfig):
        return REWARD_MODEL_COLUMNS
    return COLUMNS if config.has_rollouts else SFT_COLUMNS


def log_tracker(config: RunConfig, path: Path) -> Tracker:
    """The console's lines in a log, whether the console is a terminal or not."""
    file = LogFile(path)
    return LinesTracker(
        config.num_steps,
        columns_of(config),
        write=lambda line: file.write([line]),
        close=file.close,
    )


def console_tracker(config: RunConfig, resumed_from: int | None) -> Tracker:
    """The tracker for standard output: a terminal or a file."""
    console = Console(highlight=False)
    columns = columns_of(config)
    if not console.is_terminal or console.is_dumb_terminal:
        return LinesTracker(config.num_steps, columns)
    return TerminalTracker(
        config.num_steps,
        config.rows_per_step,
        resumed_from or 0,
        console,
        columns=columns,
        activity="sampling" if config.has_rollouts else "training",
    )


class LinesTracker(Tracker):
    """One line per step: for files, CI and `ray job logs`.

    Args:
        max_steps: of the run.
        columns: what a line shows.
        write: gets each line; print, if it is left out.
        close: releases what `write` holds.
    """

    def __init__(
        self,
        max_steps: int,
        columns: Sequence[Column] = COLUMNS,
        write: Callable[[str], object] | None = None,
        close: Callable[[], object] = lambda: None,
    ):
        self._max_steps = max_steps
        self._columns = columns
        self._write = write or partial(print, flush=True)
        self._close = close

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Write the line."""
        if is_evaluation(metrics):
            self._write(" | ".join(evaluation_items(step, metrics)))
            return
        numbers = [f"{c.header} {cell(c, metrics)}" for c in self._columns if c.name in metrics]
        line = f"step {step}/{self._max_steps} | {' | '.join(numbers)}"
        if phases := phases_line(metrics):
            line += f" | {phases}"
        if "remaining_time" in metrics:
            line += f" | {metrics['remaining_time']} left"
        self._write(line)

    def log_warning(self, step: int, text: str) -> None:
        """Write it."""
        self._write(f"warning, step {step}: {text}")

    def close(self) -> None:
        """Nothing is pending."""
        self._close()


class TerminalTracker(Tracker):
    """One row a step; below them a bar with the time left, and the current activity."""

    def __init__(
        self,
        max_steps: int,
        groups_per_step: int,
        first_step: int,
        console: Console,
        *,
        columns: Sequence[Column] = COLUMNS,
        activity: str = "sampling",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._max_steps = max_steps
        self._step_width = 2 * len(str(max_steps)) + 1
        self._groups_per_step = groups_per_step
        self._console = console
        self._all_columns = columns
        self._step_begins_with = activity
        self._clock = clock
        self._start = clock()
        self._step = first_step
        self._seconds_per_step: float | None = None
        self._last_step_end = self._start
        self._rows = 0
        self._activity = "starting"
        self._phases = ""
        self._groups_of: dict[tuple[str, int], int] = {}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
        self._live.start(refresh=True)  # before its thread: two first renders would share a line

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Print a row above the bar and move the bar."""
        self._activity = self._step_begins_with if step < self._max_steps else "finishing"
        if is_evaluation(metrics):
            self._groups_of.pop(("eval", step), None)
            items = evaluation_items(step, metrics)
            line = join_wrapped(items, " | ", self._console.width)
            self._console.print(Text(line, style="cyan"), soft_wrap=True)
            return
        self._groups_of.pop(("train", step), None)
        columns = self._columns(metrics)
        if self._rows % ROWS_BETWEEN_HEADERS == 0:
            header = "  ".join(f"{c.header:>{c.width}}" for c in columns)
            self._console.print(Text(f"{'step':>{self._step_width}}  {header}", style="bold"))
        row = "  ".join(f"{cell(c, metrics):>{c.width}}" for c in columns)
        progress = f"{step}/{self._max_steps}"
        self._console.print(Text(f"{progress:>{self._step_width}}  {row}"))
        self._rows += 1
        self._step = step
        self._last_step_end = self._clock()
        speed = metrics.get("train_speed(iter/s)")
        self._seconds_per_step = 1 / speed if isinstance(speed, float) and speed > 0 else None
        self._phases = phases_line(metrics)

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Count the groups of the step."""
        if split == "filtered":
            return
        done = self._groups_of[split, step] = self._groups_of.get((split, step), 0) + 1
        if split == "eval":
            self._activity = f"evaluating: {done} prompts"
        elif done < self._groups_per_step:
            self._activity = f"sampling: {done} of {self._groups_per_step} groups"
        else:
            self._activity = "updating"

    def log_warning(self, step: int, text: str) -> None:
        """Print it above the bar."""
        self._console.print(Text(f"warning, step {step}: {text}", style="bold yellow"))

    def close(self) -> None:
        """Leave the bar on the screen as it is, and release the terminal."""
        self._activity = "finished" if self._step == self._max_steps else "stopped"
        self._live.stop()

    def _columns(self, metrics: Metrics) -> list[Column]:
        """The run's columns that fit beside the step."""
        room = self._console.width - self._step_width
        columns = []
        for column in (column for column in self._all_columns if column.name in metrics):
            room -= 2 + column.width
            if room < 0:
                break
            columns.append(column)
        return columns

    def _render(self) -> RenderableType:
        """The two lines under the rows."""
        now = self._clock()
        line = Table.grid(expand=True, padding=(0, 1))
        for ratio in (None, 1, None, None):
            line.add_column(ratio=ratio, no_wrap=True)
        line.add_row(
            f"{self._step}/{self._max_steps}",
            ProgressBar(total=self._max_steps, completed=self._step),
            f"{self._step / self._max_steps:.0%}",
            f"{clock_time(now - self._start)}, {self._time_left(now)}",
        )
        last_step = f" | last step: {self._phases}" if self._phases else ""
        status = Text(self._activity + last_step, no_wrap=True, overflow="ellipsis")
        return Group(line, status)

    def _time_left(self, now: float) -> str:
        """Time until the end of the last step; it also counts down during a step."""
        if self._seconds_per_step is None:
            return "time left unknown"
        at_step_end = (self._max_steps - self._step) * self._seconds_per_step
        return f"{clock_time(max(0.0, at_step_end - (now - self._last_step_end)))} left"


def cell(column: Column, metrics: Metrics) -> str:
    """The number of a column, formatted."""
    return format(metrics[column.name], column.format)


def phases_line(metrics: Metrics) -> str:
    """Seconds of each phase, the longest first: "rollout 3.1s, policy_update 1.4s"."""
    phases = {
        name.removeprefix("time/"): seconds
        for name, seconds in metrics.items()
        if name.startswith("time/") and name != "time/step" and isinstance(seconds, float)
    }
    longest_first = sorted(phases, key=lambda phase: -phases[phase])
    return ", ".join(f"{phase} {phases[phase]:.1f}s" for phase in longest_first)


def evaluation_items(step: int, metrics: Metrics) -> list[str]:
    """Means of an evaluation: "held-out after step 20", "reward 1.234", ..."""
    shown = [f"held-out after step {step}"]
    for name, value in metrics.items():
        if name == "eval/reward":
            shown.append(f"reward {value:.3f}")
        elif reward := re.fullmatch(r"eval/rewards/(.+)/mean", name):
            shown.append(f"{reward[1]} {value:.3f}")
        elif loss := re.fullmatch(r"eval/((?:[^/]+/)?(?:loss|perplexity))", name):
            shown.append(f"{loss[1].replace('/', ' ')} {value:.4g}")
        elif accuracy := re.fullmatch(r"eval/([^/]+/)?(?:mean_token_)?accuracy", name):
            shown.append(f"{(accuracy[1] or '').replace('/', ' ')}accuracy {value:.3f}")
        elif held_out := re.fullmatch(r"eval/([^/]+/)?rewards/(accuracies|margins)", name):
            word = {"accuracies": "accuracy", "margins": "margin"}[held_out[2]]
            shown.append(f"{(held_out[1] or '').replace('/', ' ')}{word} {value:.3f}")
        elif margin := re.fullmatch(r"eval/([^/]+/)?margin", name):
            shown.append(f"{(margin[1] or '').replace('/', ' ')}margin {value:.3f}")
        elif score := re.fullmatch(r"eval/((?:[^/]+/)?(?:pass|mean|maj)@\d+|[^/]+/reward)", name):
            shown.append(f"{score[1].replace('/', ' ')} {value:.3f}")
        elif name == "eval/completions/mean_length":
            shown.append(f"length {value:.0f}")
    return shown


def clock_time(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
