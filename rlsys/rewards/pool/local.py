"""Reward processes as children of this one, without Ray: for `rlsys rewards try` and tests."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlsys.rewards.pool.process import Died, RewardProcess
from rlsys.rewards.pool.runner import ProcessSettings, Task
from rlsys.rewards.pool.work import ProcessDied

Reference = tuple[RewardProcess, int]


class LocalBackend:
    """Reward processes of this process; see `rlsys.rewards.pool.work.Backend`."""

    def __init__(self, settings: ProcessSettings):
        self._settings = settings
        self._results: dict[Reference, Any] = {}
        self._arrived = threading.Condition()

    def spawn(self, names: Sequence[str], *, concurrent: bool) -> tuple[RewardProcess, Reference]:
        """Start a process."""

        def take(number: int, result: Any) -> None:
            with self._arrived:
                self._results[process, number] = result
                self._arrived.notify_all()

        with self._arrived:  # no result comes before `process` has its value
            settings = replace(self._settings, names=names)
            process = RewardProcess(settings, take, concurrent=concurrent)
        return process, (process, 0)

    def score(self, process: RewardProcess, task: Task) -> Reference:
        """Send a task."""
        return process, process.call(task)

    def wait(self, references: Sequence[Reference], timeout_s: float) -> list[Reference]:
        """All that are done, at least one unless time is over."""
        with self._arrived:
            self._arrived.wait_for(lambda: any(r in self._results for r in references), timeout_s)
            return [reference for reference in references if reference in self._results]

    def result(self, reference: Reference) -> Any:
        """Of a reference that is done."""
        with self._arrived:
            result = self._results.pop(reference)
        if isinstance(result, Died):
            raise ProcessDied(result.why)
        return result

    def kill(self, process: RewardProcess) -> None:
        """End a process."""
        process.kill()
        with self._arrived:
            self._results = {r: v for r, v in self._results.items() if r[0] is not process}
