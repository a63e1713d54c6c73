"""What a failure of reward code costs a completion, and what is told about it."""

from __future__ import annotations

import logging
import reprlib

from rlsys.config import RewardConfig
from rlsys.rewards.pool.work import Part
from rlsys.types import RewardFailure

logger = logging.getLogger(__name__)


class RewardCodeError(RuntimeError):
    """Reward code failed and `reward.on_error` says raise; the message ends with what to do."""


class Failures:
    """The policies of a config, and what was told already."""

    def __init__(self, config: RewardConfig, *, in_run: bool = True):
        self._config = config
        self._in_run = in_run
        self._told: set[tuple[str, str]] = set()

    def policy(self, kind: RewardFailure) -> str:
        """What a failed completion is scored by: "raise", "zero" or "drop"."""
        if kind == "error":
            return self._config.on_error
        if self._config.on_timeout is not None:
            return self._config.on_timeout
        return "zero" if self._config.on_error == "raise" else self._config.on_error

    def tell(self, part: Part, kind: RewardFailure, report: str, policy: str) -> None:
        """Log the first failure of a function of each kind; metrics count all."""
        if (part.name, kind) not in self._told:
            self._told.add((part.name, kind))
            logger.warning(
                "%s\n%s More failures of this kind are counted in %s and not shown.",
                self.story(part, kind, report),
                self._consequence(kind, policy),
                "metrics" if self._in_run else "the table",
            )

    def _consequence(self, kind: RewardFailure, policy: str) -> str:
        if self._in_run:
            return f"The completion is {'scored 0' if policy == 'zero' else 'dropped'}."
        if kind == "error":
            return "A run would end here (reward.on_error: raise)."
        return "A run would score the completion 0 (unless reward.on_timeout is set otherwise)."

    def story(self, part: Part, kind: RewardFailure, report: str) -> str:
        """What happened, to which completion, and what to do about it."""
        group = part.group.group
        where = f"prompt {group.prompt.prompt_id!r}"
        if len(part.indexes) == 1:
            index = part.indexes[0]
            where += f", completion {index}: {_SHORT.repr(group.completions[index].text)}"
        if kind == "error":
            if part.trial is not None and part.trial.kind == "error":
                report = part.trial.report  # alone it may raise something else
            return f"{report}\n({where})"
        if kind == "timeout":
            return (
                f"reward function {part.name!r} was killed after {part.timeout_s:g} s ({where}). "
                f"reward.timeout_s = {self._config.timeout_s:g} s is for a group, an equal share "
                "of it for one completion tried alone after the function's first call. Look for a "
                "loop without end or a wait without limit in the function, or raise the limit."
            )
        return (
            f"{report}\nreward function {part.name!r} ended its process ({where}): a crash of C "
            "code, os._exit, or more memory than reward.max_memory_mb."
        )


_SHORT = reprlib.Repr()
_SHORT.maxstring = 120
