"""Files that a thread of each rank writes while the rank goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from rlsys.file_sums import FileSum, files_below, sum_files
from rlsys.files import check_writable, flush_to_disk


class Files(Protocol):
    """What a rank writes, from copies that nothing changes meanwhile."""

    def write(self) -> Any:
        """Write this rank's files; returns what `conclude` needs of it, as a pickle."""

    def names(self) -> list[str]:
        """Names in the folder of this rank's files, once they are written.

        The first rank names none: it has all files that are not another rank's.
        """

    def conclude(self, written: Sequence[Any]) -> None:
        """Write what needs the results of all ranks' `write`; the first rank calls."""


Write = Callable[[], None]
"""Writes files that were copied before."""


@dataclass(frozen=True, slots=True)
class FilesOfFirst:
    """Files that the first rank alone writes."""

    write: Write

    def names(self) -> list[str]:
        """See Files."""
        return []

    def conclude(self, written: Sequence[Any]) -> None:
        """See Files."""


class BackgroundWriter:
    """Writes one folder at a time; every rank of the model has one.

    Args:
        timeout_s: seconds that one rank waits for the files of the others.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._group: Any = None
        """Ranks meet here in the thread. On the default group they would meet those that train."""
        self._thread: threading.Thread | None = None
        self._ended: dict[Path, dict[str, FileSum] | Exception] = {}
        """Folder -> what became of its write, until somebody asks."""
        self._folder: Path | None = None
        """The one that is being written, or the last."""

    def start(self, folder: Path, files: Files, *, in_background: bool) -> None:
        """Start writing into an existing folder; every rank calls.

        Args:
            folder: on a disk that all ranks share.
            files: this rank's.
            in_background: whether to return before they are written.
        """
        if self._thread is not None:  # of a checkpoint that nobody waits for any more
            self._thread.join(self._timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"a disk took more than {self._timeout_s:g} s for a checkpoint")
        if self._group is None and dist.get_world_size() > 1:
            timeout = timedelta(seconds=self._timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._folder = folder
        self._ended.pop(folder, None)
        if not in_background:
            self._write(folder, files)
            return
        self._thread = threading.Thread(target=self._write, args=(folder, files), daemon=True)
        self._thread.start()

    def sums(self, folder: Path) -> dict[str, FileSum] | None:
        """The sums of this rank's files in `folder`; None while they are being written.

        Raises:
            OSError: this rank or another one could not write, or this process is a new one.
        """
        if folder == self._folder and self._thread is not None and self._thread.is_alive():
            return None
        ended = self._ended.get(folder)
        if ended is None:
            raise OSError(f"the process that was writing {folder} has been replaced")
        if isinstance(ended, Exception):
            raise ended
        return ended

    def _write(self, folder: Path, files: Files) -> None:
        try:
            self._ended[folder] = self._written(folder, files)
        except Exception as error:
            self._ended[folder] = error

    def _written(self, folder: Path, files: Files) -> dict[str, FileSum]:
        """Write; the sums of this rank's files."""
        results: Any = None
        failure = None
        try:
            results = files.write()
        except Exception as error:
            failure = self._reason(folder, error)
        gathered = self._gathered((failure, results, files.names() if failure is None else []))
        failures, written, names = zip(*gathered, strict=True)
        failed = next(filter(None, failures), None)
        if failed is not None:
            raise OSError(failed)
        own = names[dist.get_rank()]
        if dist.get_rank() == 0:
            files.conclude(written)
            flush_to_disk(folder)
            others = {name for of_rank in names for name in of_rank}
            own = [name for name in files_below(folder) if name not in others]
        return sum_files(folder, own)

    def _gathered(self, own: Any) -> list[Any]:
        gathered = [own] * dist.get_world_size()
        if self._group is not None:
            dist.all_gather_object(gathered, own, group=self._group)
        return gathered

    @staticmethod
    def _reason(folder: Path, error: Exception) -> str:
        """Why a write failed: libraries hide what the system said, so it is asked again."""
        if not isinstance(error, OSError):
            try:
                check_writable(folder)
            except OSError as of_system:
                return str(of_system)
        return f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)


def in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that a later change of the tensor does not reach."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def popped(tensors: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in order, each of which leaves the list when its turn comes."""
    tensors.reverse()
    while tensors:
        yield tensors.pop()


def write_now(
    tensors: Iterator[tuple[str, torch.Tensor]],
    write: Callable[[Iterator[tuple[str, torch.Tensor]]], None],
) -> Write:
    """Write what all ranks export together; the result raises what the disk refused.

    The other ranks are in the middle of collectives by then, so this one takes part to the end.
    """
    try:
        write(tensors)
    except OSError as error:
        failed = error
        for _ in tensors:
            pass
    else:
        return lambda: None

    def fail() -> None:
        raise failed

    return fail
