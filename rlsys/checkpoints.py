"""Which checkpoints a run keeps: whole ones, the newest few."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

from rlsys.config import CheckpointConfig


class Checkpointed(Protocol):
    """What can be saved and continued."""

    def save_checkpoint(self, folder: Path) -> None:
        """Write everything into an empty folder."""


class Checkpoints:
    """Folders `step-<step>` in the run's checkpoint folder.

    A checkpoint is written beside its place and then renamed, and loses its name before it is
    deleted: one that is there is whole, whenever the process is killed.
    """

    def __init__(self, folder: Path, policy: Checkpointed, config: CheckpointConfig):
        self._folder = folder
        self._policy = policy
        self._config = config

    def after_step(self, step: int) -> None:
        """Save when `save_steps` says so, then drop the oldest beyond `save_total_limit`."""
        if self._config.save_steps is None or step % self._config.save_steps:
            return
        for leftover in self._folder.glob("step-*.partial"):  # of a process that was killed
            shutil.rmtree(leftover)
        if step in checkpoint_steps(self._folder):  # of a run that was resumed from before it
            self._remove(step)
        partial = self._partial(step)
        partial.mkdir(parents=True)
        self._policy.save_checkpoint(partial)
        partial.rename(self._folder / f"step-{step}")
        for old in checkpoint_steps(self._folder)[: -self._config.save_total_limit]:
            self._remove(old)

    def _partial(self, step: int) -> Path:
        return self._folder / f"step-{step}.partial"

    def _remove(self, step: int) -> None:
        shutil.rmtree((self._folder / f"step-{step}").rename(self._partial(step)))


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in `folder`, oldest first."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())
