"""What is wrong with a config, a machine or data: one type, and one error that lists all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import indent

from rlsys.text import counted


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a run cannot start."""

    text: str
    """What was found, what is allowed, and what to do."""
    only_here: bool = False
    """True if this machine lacks something, a file say; false if the config is wrong everywhere."""

    def __str__(self) -> str:
        return self.text


class ProblemsError(ValueError):
    """All problems of one thing, each with a bullet.

    Args:
        head: the thing, such as the path of a config.
        problems: those to list.
        num_more: problems that are counted only.
        note: text below the list.
    """

    def __init__(
        self, head: str, problems: Sequence[Problem], num_more: int = 0, note: str | None = None
    ):
        super().__init__(head, problems, num_more, note)  # arguments, so that it can be pickled
        self.problems = list(problems)

    def __str__(self) -> str:
        head, problems, num_more, note = self.args
        lines = [f"{head} has {counted(len(problems) + num_more, 'problem')}:"]
        lines += [indent(str(p), "    ").replace("    ", "  - ", 1) for p in problems]
        lines += [f"  ... and {num_more:,} more"] if num_more else []
        lines += [note] if note else []
        return "\n".join(lines)


class RunFailed(RuntimeError):
    """A run failed; the message says who failed at what, with that process's traceback."""


class TrainingStopped(RunFailed):
    """A run must not go on: its metrics show that it learns nothing, or what nobody wants."""


class NonFiniteWeights(RunFailed):
    """Weights or optimizer state hold NaNs or infinities, so they are neither sent nor saved."""
