"""The picture of a run: rewards, lengths and distances in GRPO, the loss in supervised training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlsys.files import read_jsonl, replacing
from rlsys.run.folder import RunDir
from rlsys.tracking.base import Metrics, Tracker, is_evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = dict[int, float]
"""One metric: step -> value, in order of steps."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, distinct for colour-blind readers; line styles differ too."""
LINE_STYLES = ("-", "--", ":", "-.")
SMOOTHING_STEPS = 5
"""The bold line is the mean of this many steps, since single steps are noisy."""


class CurveTracker(Tracker):
    """Draws reward_curve.png or loss_curve.png when the run ends or fails."""

    def __init__(self, run_dir: RunDir):
        self._run_dir = run_dir
        self._has_steps = False

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Note that there is something to draw; the numbers come from metrics.jsonl."""
        self._has_steps = self._has_steps or not is_evaluation(metrics)

    def close(self) -> None:
        """Draw."""
        if self._has_steps:
            plot_run(self._run_dir.path)


def plot_run(run_dir: Path) -> Path:
    """Draw a run's metrics.jsonl as OUTPUT_DIR/reward_curve.png, at any time.

    Without rewards, in supervised training, it is loss_curve.png.

    Returns:
        The path of the PNG, which is replaced as a whole.

    Raises:
        ValueError: Nothing has been logged yet.
    """
    # This import takes a second, which other commands need not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files = RunDir(run_dir)
    if not files.metrics.exists():
        raise ValueError(
            f"{files.metrics} does not exist: {run_dir} holds no run that took a step."
        )
    series = load_series(read_jsonl(files.metrics))
    if not series:
        raise ValueError(f"{files.metrics} is empty: wait for the first step, then plot again.")

    has_rewards = {"reward", "eval/reward"} & series.keys()
    has_losses = any(name.rpartition("/")[2] == "loss" for name in series)
    picture = _LOSSES if has_losses and not has_rewards else _REWARDS
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(picture.panels), sharex=True, height_ratios=[2.2, 1, 1])
    figure.suptitle(run_dir.resolve().name, fontsize=14)
    for axes, draw in zip(panels, picture.panels, strict=True):
        draw(axes, series)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            # Beside the axes: nothing is hidden, however the curves go.
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    path = picture.path(files)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=150)
    return path


def load_series(rows: Iterable[dict[str, Any]]) -> dict[str, Series]:
    """Metrics by name, without texts; the last value of a step counts, and null is NaN."""
    series: dict[str, Series] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                number = float("nan") if value is None else float(value)
                series.setdefault(name, {})[row["step"]] = number
    return {name: dict(sorted(by_step.items())) for name, by_step in series.items()}


def smoothed(series: Series, window: int) -> Series:
    """The mean of the last `window` values at each step; fewer at the start, without NaN."""
    steps, means = list(series), {}
    for end, step in enumerate(steps, start=1):
        values = [series[s] for s in steps[max(0, end - window) : end]]
        known = [value for value in values if not math.isnan(value)]
        means[step] = fmean(known) if known else float("nan")
    return means


def _draw_rewards(axes: Axes, series: dict[str, Series]) -> None:
    axes.set_title("Reward", loc="left")
    axes.set_ylabel("mean over the completions of a step")
    if "reward" in series:
        bold = _draw_smoothed(axes, series["reward"], "reward")
        if "reward_std" in series:
            std = series["reward_std"]
            low, high = (
                {step: value + sign * std.get(step, 0.0) for step, value in bold.items()}
                for sign in (-1, 1)
            )
            _draw_band(axes, low, high, label="± reward_std")
    _draw_held_out(axes, series, "eval/reward", COLORS[0])
    names = [name for name in series if name.startswith("rewards/") and name.endswith("/mean")]
    for index, name in enumerate(names, start=1):
        color = COLORS[1 + (index - 1) % (len(COLORS) - 2)]
        _draw_line(
            axes,
            series[name],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            color=color,
            label=name.removeprefix("rewards/").removesuffix("/mean"),
        )
        _draw_held_out(axes, series, f"eval/{name}", color)


def _draw_smoothed(axes: Axes, values: Series, label: str) -> Series:
    """A bold line, of means where there are many steps, and then the steps too; returns it."""
    is_long = len(values) >= 4 * SMOOTHING_STEPS
    bold = smoothed(values, SMOOTHING_STEPS) if is_long else values
    label = f"{label}, mean of {SMOOTHING_STEPS} steps" if is_long else label
    _draw_line(axes, bold, color=COLORS[0], linewidth=2.2, label=label)
    if is_long:
        _draw_line(axes, values, color=COLORS[0], alpha=0.35, linewidth=1)
    return bold


def _draw_line(axes: Axes, series: Series, **style: Any) -> None:
    """A line, or a dot if there is only one step, which a line would not show."""
    marker = "o" if len(series) == 1 else ""
    axes.plot(list(series), list(series.values()), **{"marker": marker} | style)


def _draw_band(axes: Axes, low: Series, high: Series, *, label: str) -> None:
    style: dict[str, Any] = {"color": COLORS[0], "alpha": 0.12, "linewidth": 0}
    axes.fill_between(list(low), list(low.values()), list(high.values()), label=label, **style)


def _draw_held_out(axes: Axes, series: dict[str, Series], name: str, color: str) -> None:
    """Markers in the colour of the training curve of the same metric."""
    if name in series:
        label = f"held-out {name.removeprefix('eval/rewards/').removeprefix('eval/')}"
        _draw_line(
            axes,
            series[name],
            linestyle="none",
            marker="D",
            markersize=6.5,
            markerfacecolor=color,
            markeredgecolor="white",
            label=label.removesuffix("/mean"),
            zorder=3,
        )


def _draw_lengths(axes: Axes, series: dict[str, Series]) -> None:
    axes.set_title("Completion length", loc="left")
    axes.set_ylabel("tokens")
    names = [f"completions/{kind}_length" for kind in ("mean", "min", "max")]
    if all(name in series for name in names):
        mean, low, high = (series[name] for name in names)
        _draw_line(axes, mean, color=COLORS[0], linewidth=2, label="mean")
        _draw_band(axes, low, high, label="min to max")
        axes.set_ylim(bottom=0)


def _draw_differences(axes: Axes, series: dict[str, Series]) -> None:
    axes.set_title("Distance of the policy", loc="left")
    axes.set_ylabel("nats per token")
    curves = [
        ("kl", "-", "to the reference (kl)"),
        ("sampling/logp_difference/mean", "--", "to the rollout engine, mean"),
        ("sampling/logp_difference/max", ":", "to the rollout engine, max"),
        ("sampling/kl", "-.", "to the rollout engine (k3 KL)"),
    ]
    positive = False
    for color, (name, style, label) in zip(COLORS, curves, strict=False):
        if name in series:
            _draw_line(axes, series[name], linestyle=style, color=color, label=label)
            positive = positive or any(value > 0 for value in series[name].values())
    if positive:
        axes.set_yscale("log", nonpositive="mask")


def _draw_losses(axes: Axes, series: dict[str, Series]) -> None:
    axes.set_title("Loss", loc="left")
    axes.set_ylabel("nats per token that is trained on")
    if "loss" in series:
        _draw_smoothed(axes, series["loss"], "loss")
    names = [name for name in series if name.startswith("eval/") and name.endswith("/loss")]
    for index, name in enumerate(names):
        set_name = name.removeprefix("eval/").removesuffix("loss").rstrip("/")
        color = COLORS[1 + index % (len(COLORS) - 1)] if set_name else COLORS[0]
        _draw_held_out(axes, series, name, color)


def _draw_learning_rate(axes: Axes, series: dict[str, Series]) -> None:
    axes.set_title("Learning rate", loc="left")
    _draw_line(axes, series.get("learning_rate", {}), color=COLORS[0])
    axes.set_ylim(bottom=0)


def _draw_grad_norm(axes: Axes, series: dict[str, Series]) -> None:
    axes.set_title("Gradient norm, before clipping", loc="left")
    _draw_line(axes, series.get("grad_norm", {}), color=COLORS[0])
    axes.set_ylim(bottom=0)


@dataclass(frozen=True, slots=True)
class _Picture:
    """What is drawn where, one panel below the other."""

    path: Callable[[RunDir], Path]
    panels: tuple[Callable[[Axes, dict[str, Series]], None], ...]


_REWARDS = _Picture(lambda run: run.reward_curve, (_draw_rewards, _draw_lengths, _draw_differences))
_LOSSES = _Picture(lambda run: run.loss_curve, (_draw_losses, _draw_learning_rate, _draw_grad_norm))
