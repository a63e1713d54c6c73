"""Which checkpoints a run keeps: whole ones, the newest few."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rlsys.config import CheckpointConfig
from rlsys.files import flush_to_disk

ROLLOUTS_FILE = "rollouts.json"
REFERENCE_FOLDER = "reference"
MAX_SHARE_OF_TIME = 0.1
"""Of a run, for checkpoints of `save_steps: auto`."""


class Checkpointed(Protocol):
    """What writes its own files."""

    def save_checkpoint(self, folder: Path) -> None:
        """Write everything into an empty folder."""


class SavesModel(Protocol):
    """What writes a Hugging Face model folder."""

    def save_model(self, folder: Path) -> None:
        """Write the folder; whole or not at all."""


class Stateful(Protocol):
    """What has a small state."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as JSON has it."""


class Checkpoints:
    """Folders `step-<step>` in the run's checkpoint folder.

    A checkpoint is written beside its place and then renamed, and loses its name before it is
    deleted: one that is there is whole, whenever the process is killed or the machine crashes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        policy: Checkpointed,
        reference: SavesModel | None,
        rollouts: Stateful,
        config: CheckpointConfig,
        last_step: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`reference` only where it changes; otherwise its own folder says what it is.

        `last_step` of the run is saved too, so that a longer run continues where it ended.
        """
        self._folder = folder
        self._policy = policy
        self._reference = reference
        self._rollouts = rollouts
        self._config = config
        self._last_step = last_step
        self._clock = clock
        self._worth_saving_from = -math.inf
        """Time on the clock from which on `auto` finds a checkpoint worth what it takes."""

    def after_step(self, step: int) -> None:
        """Save when `save_steps` says so."""
        if self._is_due(step):
            self.save(step, self._rollouts.state_dict())

    def _is_due(self, step: int) -> bool:
        interval = self._config.interval(self._last_step)
        if interval is None:
            return False
        if step == self._last_step:
            return True
        is_worth_it = self._config.save_steps != "auto" or self._clock() >= self._worth_saving_from
        return step % interval == 0 and is_worth_it

    def save(self, step: int, rollouts: dict[str, Any]) -> None:
        """Save the policy as it is, then drop the oldest beyond `save_total_limit`.

        Args:
            step: that the policy has finished.
            rollouts: the state of the rollouts after that step.
        """
        start = self._clock()
        for leftover in self._folder.glob("step-*.partial"):  # of a process that was killed
            shutil.rmtree(leftover)
        if step in checkpoint_steps(self._folder):  # of a run that was resumed from before it
            self._remove(step)
        partial = self._partial(step)
        partial.mkdir(parents=True)
        self._policy.save_checkpoint(partial)
        if self._reference is not None:
            self._reference.save_model(partial / REFERENCE_FOLDER)
        (partial / ROLLOUTS_FILE).write_text(json.dumps(rollouts))
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


def load_rollouts_state(folder: Path) -> dict[str, Any]:
    """The state of the rollouts in the checkpoint `folder`.

    Raises:
        ValueError: the checkpoint is of an rlsys that did not write one.
    """
    try:
        state: dict[str, Any] = json.loads((folder / ROLLOUTS_FILE).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {ROLLOUTS_FILE}, so it was written by an older rlsys and does not "
            "say where in the data the run was. Start a new run from its weights: set model.path "
            "to the model of that run, and another output_dir."
        ) from None
    return state


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in `folder`, oldest first."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())
