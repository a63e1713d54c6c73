"""The tracker that ends a run with a table: where the time went, and what to change first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rlsys.config import Config, RunConfig
from rlsys.files import replacing
from rlsys.run.folder import RunDir
from rlsys.timeline.advice import RunFacts
from rlsys.timeline.shares import TimeShares
from rlsys.timeline.spans import Span
from rlsys.timeline.table import summary_text
from rlsys.tracking.base import Metrics, Tracker, is_evaluation
from rlsys.types import Device

LENGTHS = ("completions/max_length", "completions/mean_length")
TOKENS = {"num_completion_tokens": "completion tokens", "num_loss_tokens": "trained tokens"}
"""Metrics that are summed over the steps, and what a line of the table calls them."""


class SummaryTracker(Tracker):
    """Prints the table when the run ends, also one that fails, and writes it to summary.md.

    It is about the steps of this process: what another process did before a resume is not in it.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir):
        self._config = config
        self._path: Path = run_dir.summary
        self._device: Device = "cuda"
        self._shares = TimeShares()
        self._of_step: list[Span] = []
        self._tokens = dict.fromkeys(TOKENS, 0.0)
        self._tails: list[float] = []

    def begin(self, config: RunConfig, device: Device) -> None:
        """See Tracker."""
        self._config, self._device = config, device

    def log_timeline(self, spans: Sequence[Span]) -> None:
        """Count the spans of a step when the next one begins."""
        if self._of_step and self._of_step[0].step != spans[0].step:
            self._shares.add_step(self._of_step)
            self._of_step = []
        self._of_step += spans

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Count tokens, and how much longer than the mean the longest completion is."""
        if is_evaluation(metrics):
            return
        for name in TOKENS:
            self._tokens[name] += _number(metrics, name)
        longest, mean = (_number(metrics, name) for name in LENGTHS)
        if mean:
            self._tails.append(longest / mean)

    def close(self) -> None:
        """Print and write the table, if a step was finished."""
        self._shares.add_step(self._of_step)
        self._of_step = []
        if not self._shares.steps:
            return
        text = self._text()
        with suppress(OSError):  # the terminal may have been closed
            print(f"\n{text}", flush=True)
        with replacing(self._path) as scratch:
            scratch.write_text(text)

    def _text(self) -> str:
        config = self._config
        tails = self._tails
        facts = RunFacts(
            method=config.command,
            device=self._device,
            is_colocated=config.is_colocated,
            max_staleness=config.rollout.max_staleness if isinstance(config, Config) else 0,
            longest_over_mean=sum(tails) / len(tails) if tails else 1.0,
        )
        speeds = {
            label: self._tokens[name] / self._shares.seconds
            for name, label in TOKENS.items()
            if self._tokens[name]
        }
        return summary_text(self._shares, facts, speeds)


def _number(metrics: Mapping[str, float | str], name: str) -> float:
    value = metrics.get(name, 0.0)
    return value if isinstance(value, float | int) else 0.0
