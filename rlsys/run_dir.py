"""What a run leaves in its output directory: every name in one place."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

RUNNING = "running"
ENDED = "ended"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What a file system without locks answers, some network ones."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """The files of one run.

    `status` holds one word: "running" from the start of training until the trackers are closed,
    then "ended", whether the run reached its last step or failed. A killed process leaves
    "running".
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, which runs again in another output_dir."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def completions(self) -> Path:
        """One JSON object a training completion."""
        return self.path / "completions.jsonl"

    @property
    def filtered_completions(self) -> Path:
        """One JSON object a completion that dynamic sampling left out."""
        return self.path / "filtered_completions.jsonl"

    @property
    def eval_completions(self) -> Path:
        """One JSON object a held-out completion."""
        return self.path / "eval_completions.jsonl"

    def completions_of(self, split: Literal["train", "eval", "filtered"]) -> Path:
        """The file of training, held-out or filtered completions."""
        paths = {
            "train": self.completions,
            "eval": self.eval_completions,
            "filtered": self.filtered_completions,
        }
        return paths[split]

    @property
    def checkpoints(self) -> Path:
        """What training continues from."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained model, a Hugging Face folder."""
        return self.path / "final"

    @property
    def reward_curve(self) -> Path:
        """The picture of the run."""
        return self.path / "reward_curve.png"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def status(self) -> Path:
        """One word, see the class."""
        return self.path / "status"

    def obstacle(self) -> str | None:
        """Why the folder cannot be written to, or made where it is not; None where it can.

        A file system may have reasons that its permissions do not show: `held` tells those.
        """
        place = self.path.absolute()
        try:
            while not _is_there(place):
                place = place.parent
        except OSError as error:
            return f"cannot be made ({error.strerror})"
        if not os.path.isdir(place):
            reason, where = f"{place} is no folder", "is no folder"
        elif not os.access(place, os.W_OK | os.X_OK):
            reason, where = f"you may not write in {place}", "is a folder that you may not write in"
        else:
            return None
        return where if place == self.path.absolute() else f"cannot be made, {reason}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else runs in this folder meanwhile; the operating system knows when a process is
        dead, whatever it was killed by. Creates the folder when needed.

        Raises:
            ValueError: another process is running in it, or nothing can be written to it.
        """
        with self._open_lock() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"output_dir: another process is running in {self.path}. Wait for it or stop "
                    "it, or choose another folder with --output_dir."
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(
                    f"note: the file system of {self.path} has no locks, so nothing keeps two runs "
                    "out of one folder",
                    flush=True,
                )
            yield

    def _open_lock(self) -> IO[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return (self.path / ".lock").open("w")
        except OSError as error:
            raise ValueError(
                f"output_dir: {self.path} cannot be written to ({error.strerror}). Choose another "
                "folder with --output_dir."
            ) from None

    def write_status(self, word: str) -> None:
        """Replace the status, creating the directory when needed."""
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.status) as scratch:
            scratch.write_text(word + "\n")

    def has_ended(self) -> bool:
        """Whether the run closed its trackers; False when it was killed or never started."""
        return self.status.exists() and self.status.read_text().strip() == ENDED


def unused_folder(folder: Path) -> Path:
    """A folder that is not there yet, named after `folder`: runs/a-2 for runs/a."""
    number = 2
    while _is_there(place := folder.with_name(f"{folder.name}-{number}")):
        number += 1
    return place


def flush_to_disk(folder: Path) -> None:
    """Return when a folder with all that is in it survives a crash of the machine."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file as a whole or not at all.

    Yields a scratch path in the same directory. When the body ends, it becomes `target` in one
    rename; when the body raises, it is removed and `target` stays as it was.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _is_there(place: Path) -> bool:
    """As `os.path.lexists`, which says of a name that is too long that nothing is there."""
    try:
        os.lstat(place)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    return True
