"""Which checkpoints and models a run keeps: whole ones, the newest few."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rlsys.config import CheckpointConfig
from rlsys.files import replacing_folder

MAX_SHARE_OF_TIME = 0.1
"""Share of a run's time that checkpoints of `save_steps: auto` may take."""


class Models:
    """Hugging Face folders `step-<step>`, of `checkpoint.save_hf_steps`.

    Args:
        folder: holds them.
        write: writes the policy's model into a folder of this name; whole or not at all.
        config: how often, and how many are kept.
    """

    def __init__(self, folder: Path, *, write: Callable[[Path], None], config: CheckpointConfig):
        self._folder = folder
        self._write = write
        self._steps = config.save_hf_steps
        self._limit = config.save_hf_total_limit

    def after_step(self, step: int) -> None:
        """Write the model if this step is one of them, then drop the oldest beyond the limit."""
        if self._steps is None or step % self._steps:
            return
        self._write(self._folder / f"step-{step}")
        kept = checkpoint_steps(self._folder)
        for old in kept[: -self._limit] if self._limit is not None else ():
            remove_step(self._folder, old)


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
        models: the models without optimizer that are kept besides.
        clock: in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        write: Callable[[Path, int], None],
        config: CheckpointConfig,
        last_step: int,
        models: Models,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder = folder
        self._write = write
        self._config = config
        self._last_step = last_step
        self._models = models
        self._clock = clock
        self._worth_saving_from = -math.inf
        """Time on the clock from which `auto` saves again."""

    def after_step(self, step: int) -> None:
        """Save when `save_steps` and `save_hf_steps` say so."""
        if self._is_due(step):
            self.save(step)
        self._models.after_step(step)

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
        with replacing_folder(self._folder / f"step-{step}") as partial:
            self._write(partial, step)
        for old in checkpoint_steps(self._folder)[: -self._config.save_total_limit]:
            remove_step(self._folder, old)
        end = self._clock()
        self._worth_saving_from = end + (end - start) / MAX_SHARE_OF_TIME


def remove_step(folder: Path, step: int) -> None:
    """Delete `step-<step>`, which loses its name first."""
    shutil.rmtree((folder / f"step-{step}").rename(folder / f"step-{step}.partial"))


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in `folder`, oldest first."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())
