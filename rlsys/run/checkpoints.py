"""Which checkpoints a run keeps: whole ones, the newest few."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rlsys.config import CheckpointConfig
from rlsys.files import flush_to_disk

MAX_SHARE_OF_TIME = 0.1
"""Share of a run's time that checkpoints of `save_steps: auto` may take."""


class Checkpoints:
    """Folders `step-<step>` in the run's checkpoint folder.

    A checkpoint is written beside its place and then renamed, and loses its name before it is
    deleted. So a folder of that name is whole, whenever the process is killed or the machine
    crashes.

    Args:
        folder: holds the checkpoints.
        write: writes everything after a step into an empty folder.
        config: how often, and how many are kept.
        last_step: the run's last step, which is saved too, so that a longer run can continue.
        clock: in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        write: Callable[[Path, int], None],
        config: CheckpointConfig,
        last_step: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder = folder
        self._write = write
        self._config = config
        self._last_step = last_step
        self._clock = clock
        self._worth_saving_from = -math.inf
        """Time on the clock from which `auto` saves again."""

    def after_step(self, step: int) -> None:
        """Save when `save_steps` says so."""
        if self._is_due(step):
            self.save(step)

    def _is_due(self, step: int) -> bool:
        interval = self._config.interval(self._last_step)
        if interval is None:
            return False
        if step == self._last_step:
            return True
        is_worth_it = self._config.save_steps != "auto" or self._clock() >= self._worth_saving_from
        return step % interval == 0 and is_worth_it

    def save(self, step: int) -> None:
        """Save the state after `step`, then drop the oldest beyond `save_total_limit`."""
        start = self._clock()
        for leftover in self._folder.glob("step-*.partial"):  # a killed process left it
            shutil.rmtree(leftover)
        if step in checkpoint_steps(self._folder):  # from before the resume
            self._remove(step)
        partial = self._partial(step)
        partial.mkdir(parents=True)
        self._write(partial, step)
        flush_to_disk(partial)
        partial.rename(self._folder / f"step-{step}")
        for old in checkpoint_steps(self._folder)[: -self._config.save_total_limit]:
            self._remove(old)
        end = self._clock()
        self._worth_saving_from = end + (end - start) / MAX_SHARE_OF_TIME

    def _partial(self, step: int) -> Path:
        return self._folder / f"step-{step}.partial"

    def _remove(self, step: int) -> None:
        shutil.rmtree((self._folder / f"step-{step}").rename(self._partial(step)))


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in `folder`, oldest first."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())
