"""What a run leaves in its output directory: every name in one place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

from rlsys import exit_codes
from rlsys.exit_codes import FULL
from rlsys.files import path_exists, replacing
from rlsys.rotation import parts

RUNNING = "running"
ENDED = "ended"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems without locks, such as some network file systems."""
LOCK_ATTEMPTS, LOCK_PAUSE_S = 10, 0.02
"""`RunDir.state` holds the lock for an instant; a run must not take that for another run."""
State = Literal["running", "starting", "ended", "killed"]


class RunDir:
    """The files of one run.

    `status` holds one word: "running" from the start of training until the run begins to close its
    files, then "ended", whether the run reached its last step, was interrupted or failed. A killed
    process leaves "running", but not its lock: `state` compares the two.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        """The resolved config, which runs again in another output_dir."""
        self.metrics = path / "metrics.jsonl"
        """One JSON object per step."""
        self.summary = path / "summary.md"
        """Where the time went, of the last process that ran here."""
        self.profile = path / "profile"
        """Traces of the steps of `profile.steps`."""
        self.warnings = path / "warnings.jsonl"
        """One JSON object when a problem of `tracking.health` begins or is over."""
        self.completions = path / "completions.jsonl"
        """One JSON object a training completion."""
        self.filtered_completions = path / "filtered_completions.jsonl"
        """One JSON object per completion that dynamic sampling left out."""
        self.eval_completions = path / "eval_completions.jsonl"
        """One JSON object a held-out completion."""
        self.timeline = path / "timeline.jsonl"
        """One JSON object a span of time in which an actor was busy."""
        self.actors = path / "actors.json"
        """The actors of the run, as they were seconds ago."""
        self.tokens = path / "tokens"
        """A Parquet file a step, of tracking.completion_tokens."""
        self.checkpoints = path / "checkpoints"
        """What training continues from."""
        self.hf = path / "hf"
        """Hugging Face folders that are kept, of `checkpoint.save_hf_steps`."""
        self.final = path / "final"
        """The trained model, a Hugging Face folder."""
        self.interrupted = path / "interrupted"
        """The model after the last finished step of a run that was interrupted or failed, a Hugging
        Face folder; removed as soon as a checkpoint holds the same."""
        self.dumps = path / "dumps"
        """Optimizer steps that were not finite, for `rlsys replay`; see policy.on_nonfinite."""
        self.reward_curve = path / "reward_curve.png"
        """The picture of a run with rewards."""
        self.loss_curve = path / "loss_curve.png"
        """The picture of a supervised run."""
        self.tensorboard = path / "tensorboard"
        """TensorBoard event files."""
        self.swanlab = path / "swanlog"
        """SwanLab's files."""
        self.environment = path / "environment.jsonl"
        """One JSON object for each process that trained here: git's state, package versions."""
        self.inputs = path / "inputs.jsonl"
        """One JSON object for each process that trained here: sums of the files that it read."""
        self.logs = path / "logs"
        """What actors and driver print, policy-0.log, and stacks of processes that hung."""
        self.status = path / "status"
        """One word, see the class."""
        self.ended = path / "ended.json"
        """How the last run in this folder ended: `exit_code`, `reason`. Not there after SIGKILL."""
        self.ray_logs = self.logs / "ray"
        """Logs of Ray clusters that failed runs had started, each in a folder of its own."""
        self.cache = path / ".cache"
        """What readers made of the other files; it can be deleted at any time."""
        self._lock = path / ".lock"
        """Locked while a run is in the folder; holds the name of its host."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that a run writes, folders too."""
        completions = (self.completions, self.filtered_completions, self.eval_completions)
        records = (self.metrics, *(part for path in completions for part in parts(path)))
        health = (self.tokens, self.warnings, *parts(self.timeline), self.actors, self.cache)
        models = (self.checkpoints, self.hf, self.final, self.interrupted, self.dumps)
        pictures = (self.reward_curve, self.loss_curve)
        trackers = (self.tensorboard, self.path / "wandb", self.swanlab)
        shown = (*pictures, *trackers, self.summary, self.profile)
        state = (self.environment, self.inputs, self.logs, self.status, self.ended)
        return (self.config, *records, *health, *models, *shown, *state)

    def completions_of(self, split: Literal["train", "eval", "filtered"]) -> Path:
        """The file of training, held-out or filtered completions."""
        return {
            "train": self.completions,
            "eval": self.eval_completions,
            "filtered": self.filtered_completions,
        }[split]

    def holds(self, path: Path) -> bool:
        """Whether a path is one of `files`, or below one."""
        own = self.path.resolve()
        return any(path.resolve().is_relative_to(own / file.name) for file in self.files)

    def obstacle(self) -> str | None:
        """Why the folder cannot be made or written to; None if its permissions allow it.

        Other reasons of a file system show only when `held` writes to it.
        """
        place = self.path.absolute()
        try:
            while not path_exists(place):
                place = place.parent
        except OSError as error:
            return f"cannot be made ({error.strerror})"
        if (self.path / "config.json").is_file():
            return "holds a model (config.json), for which commands would take the run"
        if not os.path.isdir(place):
            reason, own = f"{place} is not a folder", "is not a folder"
        elif not os.access(place, os.W_OK | os.X_OK):
            reason, own = f"you may not write in {place}", "is a folder that you may not write in"
        else:
            return None
        return own if place == self.path.absolute() else f"cannot be made, {reason}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of this folder, which is created when needed.

        The operating system ends the lock with the process, however that ends.

        Raises:
            ValueError: another process is running in it, or nothing can be written to it.
        """
        with self._open_lock() as lock:
            try:
                _lock_exclusively(lock)
            except BlockingIOError:
                raise ValueError(self.held_elsewhere()) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(
                    f"note: the file system of {self.path} has no locks, so nothing keeps two runs "
                    "out of one folder",
                    flush=True,
                )
            else:
                lock.truncate(0)
                lock.write(socket.gethostname())
                lock.flush()
            yield

    def _open_lock(self) -> IO[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return self._lock.open("a")  # keeps the host's name of a run that holds it
        except OSError as error:
            raise ValueError(
                f"output_dir: {self.path} cannot be written to ({error.strerror}). Choose another "
                "folder with --output_dir."
            ) from None

    def is_held(self) -> bool | None:
        """Whether a process runs in this folder; None if the lock does not show it.

        Some file systems show locks only on the host that took them.
        """
        try:
            with self._lock.open() as lock:
                if lock.read() not in ("", socket.gethostname()):
                    return None
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        return False

    def held_elsewhere(self) -> str:
        """What to do where another process holds the folder."""
        return (
            f"output_dir: another process is running in {self.path}. Wait for it or stop it, or "
            "choose another folder with --output_dir."
        )

    def state(self) -> State | None:
        """What the last run in this folder is doing; None before the first run.

        "starting" is also a run that is closing its files. "killed": its process ended while the
        status was "running".
        """
        word, held = self._status_word(), self.is_held()
        if word != self._status_word():  # it began or ended in between
            return self.state()
        if word == RUNNING:
            return "killed" if held is False else "running"
        if held:
            return "starting"
        return "ended" if word == ENDED else None

    def write_status(self, word: str) -> None:
        """Replace the status, creating the folder when needed."""
        self.path.mkdir(parents=True, exist_ok=True)
        if word == RUNNING:
            self.ended.unlink(missing_ok=True)
        try:
            with replacing(self.status) as scratch:
                scratch.write_text(word + "\n")
        except OSError as error:
            # A full disk has no room for another file, but this one has its block.
            if error.errno not in FULL or not self.status.exists():
                raise
            with self.status.open("r+") as file:
                file.write(word + "\n")
                file.truncate()

    def mark_ended(self) -> None:
        """Set the status to "ended"."""
        self.write_status(ENDED)

    @contextmanager
    def recording_end(self) -> Iterator[None]:
        """Write `ended` when the body ends, however it does."""
        try:
            yield
        except BaseException as error:
            self.record_end(exit_codes.of_error(error), exit_codes.reason(error))
            raise
        self.record_end(exit_codes.DONE, "done")

    def record_end(self, exit_code: int, reason: str) -> None:
        """Write `ended`, and the status; a full or broken disk raises nothing."""
        for write in (self.mark_ended, lambda: self._write_ended(exit_code, reason)):
            with suppress(OSError):
                write()

    def _write_ended(self, exit_code: int, reason: str) -> None:
        with replacing(self.ended) as scratch:
            scratch.write_text(json.dumps({"exit_code": exit_code, "reason": reason}) + "\n")

    def read_end(self) -> tuple[int, str] | None:
        """Exit code and reason of the last run's end; None if it was killed or goes on."""
        try:
            end = json.loads(self.ended.read_text())
            return int(end["exit_code"]), str(end["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def has_ended(self) -> bool:
        """Whether the run closed its trackers; False if it was killed or never started."""
        return self._status_word() == ENDED

    def _status_word(self) -> str | None:
        try:
            return self.status.read_text().strip()
        except FileNotFoundError:
            return None


def _lock_exclusively(lock: IO[str]) -> None:
    for attempt in range(LOCK_ATTEMPTS):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt == LOCK_ATTEMPTS - 1:
                raise
            time.sleep(LOCK_PAUSE_S)
