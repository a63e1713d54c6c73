"""What a failure of reward code costs a completion, and what the user reads about it."""

from __future__ import annotations

import logging
import reprlib

from rlsys.config import RewardConfig
from rlsys.problems import RunFailed
from rlsys.rewards.pool.job import Job
from rlsys.types import RewardFailure

logger = logging.getLogger(__name__)


class RewardCodeError(RunFailed):
    """Reward code ends the run: it failed under `on_error: raise`, or its process did not start."""


class FailurePolicy:
    """Whether a failure ends the run, scores 0 or drops the completion; logs the first ones."""

    def __init__(self, config: RewardConfig, *, in_run: bool = True):
        self._config = config
        self._in_run = in_run
        self._logged: set[tuple[str, str]] = set()

    def choose(self, kind: RewardFailure) -> str:
        """Return "raise", "zero" or "drop"."""
        if kind == "error":
            return self._config.on_error
        if self._config.on_timeout is not None:
            return self._config.on_timeout
        return "zero" if self._config.on_error == "raise" else self._config.on_error

    def log(self, job: Job, kind: RewardFailure, report: str) -> None:
        """Log the first failure of each function and kind; metrics count all."""
        if (job.function, kind) not in self._logged:
            self._logged.add((job.function, kind))
            logger.warning(
                "%s\n%s More failures of this kind are counted in %s and not shown.",
                self.describe(job, kind, report),
                self._consequence(kind),
                "metrics" if self._in_run else "the table",
            )

    def _consequence(self, kind: RewardFailure) -> str:
        if self._in_run:
            return f"The completion is {'scored 0' if self.choose(kind) == 'zero' else 'dropped'}."
        if kind == "error":
            return "A run would end here (reward.on_error: raise)."
        return "A run would score the completion 0 (unless reward.on_timeout is set otherwise)."

    def describe(self, job: Job, kind: RewardFailure, report: str) -> str:
        """What happened, to which completion, and what to do about it."""
        group = job.pending.rollout_group
        where = f"prompt {group.prompt.prompt_id!r}"
        if len(job.indexes) == 1:
            index = job.indexes[0]
            where += f", completion {index}: {_SHORT.repr(group.completions[index].text)}"
        if kind == "error":
            if job.retry is not None and job.retry.kind == "error":
                report = job.retry.report  # alone it may raise something else
            return f"{report}\n({where})"
        if kind == "timeout":
            stack = f"It was here, the innermost call first:\n{report}\n" if report else ""
            return (
                f"{stack}reward function {job.function!r} was killed after {job.timeout_s:g} s "
                f"({where}). "
                f"reward.timeout_s = {self._config.timeout_s:g} s is for a group, an equal share "
                "of it for one completion tried alone after the function's first call. Look for "
                "an endless loop or a wait without limit in the function, or raise the limit."
            )
        return (
            f"{report}\nreward function {job.function!r} ended its process ({where}): a crash of C "
            "code, os._exit, or more memory than reward.max_memory_mb."
        )


_SHORT = reprlib.Repr()
_SHORT.maxstring = 120
