"""The checkpoints of a run: when they are written, and which of them and of its models are kept."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rlsys.config import CheckpointConfig
from rlsys.file_sums import FileSum
from rlsys.files import free_bytes, replacing, replacing_folder, size_text
from rlsys.interrupts import held_back
from rlsys.model.weight_files import RUN_CONFIG_FILE
from rlsys.problems import RunFailed
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps, kept_steps
from rlsys.run.manifest import checkpoint_bytes, write_manifest

AwaitFiles = Callable[[], dict[str, FileSum]]
"""Waits until all files of a checkpoint are on the disk; returns the sums of some of them."""

MAX_SHARE_OF_TIME = 0.1
"""Share of a run's time that checkpoints of `save_steps: auto` may take."""
LONG_WAIT_S = 5.0
"""A step that waits longer for the checkpoint before it is worth a line."""


class Models:
    """Hugging Face folders `step-<step>`, of `checkpoint.save_hf_steps`.

    One that cannot be written does not end the run, as with checkpoints.

    Args:
        folder: holds them.
        write: starts writing the policy's model into an empty folder.
        config: how often, and how many are kept.
    """

    def __init__(
        self, folder: Path, *, write: Callable[[Path], AwaitFiles], config: CheckpointConfig
    ):
        self._folder = folder
        self._write = write
        self._steps = config.save_hf_steps
        self._limit = config.save_hf_total_limit

    def after_step(self, step: int) -> None:
        """Write the model if this step is one of them, then drop the oldest beyond the limit."""
        if self._steps is None or step % self._steps:
            return
        try:
            with replacing_folder(self._folder / f"step-{step}") as partial:
                self._write(partial)()
        except (OSError, RunFailed) as error:
            print(f"warning: {_not_saved('model', step, self._folder, error)}", flush=True)
        kept = checkpoint_steps(self._folder)
        for old in kept[: -self._limit] if self._limit is not None else ():
            remove_step(self._folder, old)


class Checkpoints:
    """Folders `step-<step>` in the run's checkpoint folder.

    A checkpoint is written beside its place, its manifest last, and then renamed. It loses its name
    before it is deleted. So a folder of that name is whole, whenever the process is killed or the
    machine crashes. With `async_save` a thread waits for the disk, and the run goes on.

    A checkpoint that cannot be written does not end the run: the older ones stay, and the next one
    is tried when it is due. `failure` says what went wrong with the newest.

    Args:
        run: the folder of the run.
        write: copies everything after a step, and starts writing it into an empty folder.
        config: how often, and how many are kept.
        last_step: the run's last step, which is saved too, so that a longer run can continue.
        eval_steps: steps between two evaluations.
        models: the models without optimizer that are kept besides.
        expected_bytes: of a checkpoint, for the first one; 0 if that is not known.
        clock: in seconds.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        write: Callable[[Path, int], AwaitFiles],
        config: CheckpointConfig,
        last_step: int,
        models: Models,
        eval_steps: int | None = None,
        expected_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run = run
        self._folder = run.checkpoints
        self._write = write
        self._config = config
        self._last_step = last_step
        self._models = models
        self._eval_steps = eval_steps
        self._expected_bytes = expected_bytes
        self._clock = clock
        self._worth_saving_from = -math.inf
        """Time on the clock from which `auto` saves again."""
        self._writing: threading.Thread | None = None
        self._step_written = 0
        self._error: Exception | None = None
        """What stopped the thread."""
        self.failure: str | None = None
        """Why the newest checkpoint was not written; None if it was."""

    def after_step(self, step: int) -> None:
        """Save when `save_steps` and the others say so; returns when everything is copied."""
        if not self._is_writing():
            self.finish()
        if self._is_due(step):
            start = self._clock()
            self._begin_or_warn(step)
            end = self._clock()
            self._worth_saving_from = end + (end - start) / MAX_SHARE_OF_TIME
        self._models.after_step(step)

    def _is_due(self, step: int) -> bool:
        config = self._config
        interval = config.interval(self._last_step, self._eval_steps)
        if interval is None:
            return False
        retained = config.save_retain_interval
        if step == self._last_step or (retained is not None and step % retained == 0):
            return True
        is_worth_it = config.save_steps != "auto" or (
            self._clock() >= self._worth_saving_from and not self._is_writing()
        )
        return step % interval == 0 and is_worth_it

    def save(self, step: int, timeout_s: float = math.inf) -> None:
        """Save the state after `step`, and wait for the disk.

        Raises:
            RunFailed: it could not be written, or not within `timeout_s` seconds.
        """
        self._begin_or_warn(step)
        if not self.finish(timeout_s):
            raise RunFailed(f"the checkpoint of step {step} was not written in {timeout_s:.0f} s")
        if self.failure is not None:
            raise RunFailed(self.failure)

    def finish(self, timeout_s: float = math.inf) -> bool:
        """Wait for the checkpoint that is being written, and say what became of it.

        Returns:
            whether the write has ended.
        """
        if self._writing is None:
            return True
        self._writing.join(None if timeout_s == math.inf else timeout_s)
        if self._writing.is_alive():
            return False
        self._writing = None
        self._say_end()
        return True

    def _say_end(self) -> None:
        if self._error is not None:
            self._failed(self._step_written, self._error)

    def _is_writing(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    def _begin_or_warn(self, step: int) -> None:
        """Start saving; a disk that does not take it is a warning."""
        start = self._clock()
        self.finish()
        waited = self._clock() - start
        if waited > LONG_WAIT_S:
            print(
                f"note: step {step} waited {waited:.0f} s until the checkpoint of step "
                f"{self._step_written} was written: a larger checkpoint.save_steps avoids that",
                flush=True,
            )
        self.failure = self._error = None
        self._step_written = step
        try:
            with held_back("the checkpoint is copied"):
                self._begin(step)
        except OSError as error:
            self._failed(step, error)

    def _begin(self, step: int) -> None:
        for leftover in self._folder.glob("step-*.partial"):  # a killed process left it
            shutil.rmtree(leftover, ignore_errors=True)
        self._make_room()
        with ExitStack() as stack:
            partial = stack.enter_context(replacing_folder(self._folder / f"step-{step}"))
            if self._run.config.is_file():  # a disk that takes no small file shows here
                with replacing(partial / RUN_CONFIG_FILE) as scratch:
                    shutil.copy(self._run.config, scratch)  # its permissions too
            await_files = self._write(partial, step)
            rest = stack.pop_all()
        job = (step, partial, await_files, rest)
        if self._config.async_save:
            self._writing = threading.Thread(target=self._complete, args=job, daemon=True)
            self._writing.start()
        else:
            self._complete(*job)
            self._say_end()

    def _complete(
        self, step: int, partial: Path, await_files: AwaitFiles, folder: ExitStack
    ) -> None:
        """The thread: wait for the files, name the folder, then drop what is kept no longer."""
        try:
            with folder:
                write_manifest(partial, step, await_files())
            self._drop(self._config.save_total_limit)
        except Exception as error:
            self._error = error

    def _make_room(self) -> None:
        """Check that the disk has room for a checkpoint.

        Raises:
            OSError: it has not, also without the checkpoints that the next one replaces.
        """
        steps = checkpoint_steps(self._folder)
        needed = self._expected_bytes
        if steps:
            needed = checkpoint_bytes(self._folder / f"step-{steps[-1]}") or needed
        if free_bytes(self._folder) < needed:
            self._drop(max(1, self._config.save_total_limit - 1))
        if (free := free_bytes(self._folder)) < needed:
            raise OSError(
                f"No space left on device: it takes {size_text(needed)}, and the disk has "
                f"{size_text(free)} free"
            )

    def _drop(self, limit: int) -> None:
        """Delete the checkpoints that are not kept; never the newest whole one."""
        for step in checkpoint_steps(self._folder):
            if step not in kept_steps(self._run, self._config, limit):
                remove_step(self._folder, step)

    def _failed(self, step: int, error: Exception) -> None:
        """Note and say that the checkpoint of `step` is not there, and which one is."""
        steps = checkpoint_steps(self._folder)
        older = "there is no other"
        if steps:
            older = f"the newest one is {self._folder / f'step-{steps[-1]}'}"
        self.failure = f"{_not_saved('checkpoint', step, self._folder, error)}; {older}"
        print(f"warning: {self.failure}", flush=True)


def _not_saved(what: str, step: int, folder: Path, error: Exception) -> str:
    """That something is not there, why, and what room the disk has."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    is_of_disk = isinstance(error, OSError) or "OSError" in reason
    free = f", {size_text(free_bytes(folder))} free there" if is_of_disk else ""
    return f"the {what} of step {step} was not saved in {folder}: {reason}{free}"


def remove_step(folder: Path, step: int) -> None:
    """Delete `step-<step>`, which loses its name first."""
    shutil.rmtree((folder / f"step-{step}").rename(folder / f"step-{step}.partial"))
