"""Files and folders that are written as a whole, and how large they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def flush_to_disk(folder: Path) -> None:
    """Return when a folder and its contents survive a crash of the machine."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def path_exists(path: Path) -> bool:
    """Whether something has this path, dangling links included.

    Unlike `os.path.lexists` it raises OSError for a name that the file system does not allow.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    return True


def unused_folder(folder: Path) -> Path:
    """The first of runs/a-2, runs/a-3, ... that does not exist, for the folder runs/a."""
    number = 2
    while path_exists(place := folder.with_name(f"{folder.name}-{number}")):
        number += 1
    return place


def bytes_in(folder: Path) -> int:
    """Size of all files below a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size_text(num_bytes: int) -> str:
    """A size for people: "1.5 GiB" or "12.0 MiB"."""
    gib = num_bytes / 2**30
    return f"{gib:,.1f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:,.1f} MiB"
