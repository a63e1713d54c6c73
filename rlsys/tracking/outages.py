"""What a tracker loses while it does not work: said once, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from rlsys.redact import without_password
from rlsys.text import counted

WHAT = {
    "log_metrics": "step",
    "log_completions": "completion group",
    "log_warning": "warning",
    "log_timeline": "piece of timeline",
    "begin": "start",
}
"""Method of a tracker -> what one call records."""


def say_line(line: str) -> None:
    """Print a line; a terminal that was closed is no reason to end a run."""
    with suppress(OSError):
        print(line, flush=True)


class Outages:
    """Notes the failures of one tracker: a line at the first, and one when it works again."""

    def __init__(self, name: str, say: Callable[[str], object] = say_line):
        self.lost: Counter[str] = Counter()
        """Method -> calls whose record is lost, since the start."""
        self._name, self._say = name, say
        self._failing = False
        self._said_lost: Counter[str] = Counter()

    def failed(self, error: Exception, consequence: str) -> None:
        """Note a failure; only the first of an outage prints a line, with its consequence."""
        if not self._failing:
            self._failing = True
            self._say(f"note: {self._name} does not work: {one_line(error)}. {consequence}")

    def worked(self) -> None:
        """Note that a call succeeded."""
        if self._failing:
            self._failing = False
            self._say(f"note: {self._name} works again{self._new_losses()}")

    def finish(self) -> None:
        """Say what was lost since the last line that said so."""
        if losses := self._new_losses():
            self._say(f"note: {self._name}{losses}")

    def _new_losses(self) -> str:
        new = self.lost - self._said_lost
        self._said_lost = self.lost.copy()
        return f"; lost: {losses_text(new)}" if new else ""


def losses_text(lost: Counter[str]) -> str:
    """As in "2 steps, 1 completion group"."""
    return ", ".join(counted(number, WHAT[method]) for method, number in lost.items())


def one_line(error: Exception) -> str:
    """Type and message of an error, short and without passwords of addresses."""
    text = " ".join(str(error).split())
    return without_password(f"{type(error).__name__}: {text}"[:300])
