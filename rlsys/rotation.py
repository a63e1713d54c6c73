"""JSONL files that grow until they are rotated: writing, cutting back, reading what is new."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from rlsys.files import JsonlWriter, truncate_after

MARK_BYTES = 256
"""Bytes before the place where reading ended, which show later that the file is still the same:
file systems give the inode of a deleted file to the next one."""


def part_path(path: Path, number: int) -> Path:
    """The older part `number`, from 1, of a file: completions.000001.jsonl of completions.jsonl."""
    return path.with_name(f"{path.stem}.{number:06d}{path.suffix}")


def older_parts(path: Path) -> list[Path]:
    """The parts of a file that were rotated away, oldest first."""
    name = re.compile(rf"{re.escape(path.stem)}\.(\d{{6,}}){re.escape(path.suffix)}")
    try:
        found = [
            (match, item) for item in path.parent.iterdir() if (match := name.fullmatch(item.name))
        ]
    except OSError:
        return []
    return [item for _, item in sorted(found, key=lambda pair: int(pair[0][1]))]


def parts(path: Path) -> list[Path]:
    """The older parts of a file, oldest first, and then the file, whether it exists or not."""
    return [*older_parts(path), path]


def truncate_parts_after(path: Path, step: int) -> None:
    """Drop the rows of later steps from a file and its older parts, as `truncate_after` does."""
    for part in parts(path):
        truncate_after(part, step)
        if part != path and part.stat().st_size == 0:
            part.unlink()


class RotatingJsonlWriter:
    """Appends rows to a JSONL file, which becomes an older part when it is large.

    Args:
        path: the newest part.
        max_mb: mebibytes after which the next rows go to a new file; None never rotates.
    """

    def __init__(self, path: Path, max_mb: int | None):
        self._path, self._max_mb = path, max_mb
        self._writer = JsonlWriter(path)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Append rows together, one line each, to one file.

        Raises:
            OSError: of the system, such as that the disk is full.
        """
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:  # somebody deleted it, or an earlier rotation stopped half-way
            self._begin()
        else:
            if self._max_mb is not None and size >= self._max_mb << 20:
                older = older_parts(self._path)
                number = int(older[-1].suffixes[-2][1:]) if older else 0
                self._path.rename(part_path(self._path, number + 1))
                self._begin()
        self._writer.append(*rows)

    def _begin(self) -> None:
        writer = JsonlWriter(self._path)
        self._writer.close()
        self._writer = writer

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def open_parts(path: Path, stack: ExitStack) -> list[tuple[Path, IO[bytes]]]:
    """All parts of a file, opened for reading, oldest first; those that were deleted are left out.

    Parts may be rotated meanwhile: none is missing or twice, but one that has just begun may be
    left out.
    """
    found: dict[int, tuple[Path, IO[bytes]]] = {}
    newest = _open(path, stack)  # before the others: if it is rotated now, it is among them too
    for part in older_parts(path):
        if (file := _open(part, stack)) is not None:
            found[os.fstat(file.fileno()).st_ino] = (part, file)
    if newest is not None:
        found.setdefault(os.fstat(newest.fileno()).st_ino, (path, newest))
    return list(found.values())


def _open(path: Path, stack: ExitStack) -> IO[bytes] | None:
    try:
        return stack.enter_context(path.open("rb"))
    except OSError:
        return None


class GrowingFile:
    """Lines that another process appends to a file and its older parts, each read once.

    Args:
        path: the newest part.
        last_bytes: what is read of the lines that are there already; None is all.
    """

    def __init__(self, path: Path, last_bytes: int | None = None):
        self._path = path
        self._last_bytes = last_bytes
        self._inode: int | None = None
        self._offset = 0
        self._mark = b""
        """The bytes before `_offset`."""

    def new_lines(self) -> tuple[bool, Iterator[bytes]]:
        """Whole lines since the last call; half a last line is left for the next one.

        Returns:
            Whether what was read so far no longer holds, because files were cut back, replaced or
            deleted, and the lines; then they are those of all parts that are left. The iterator
            has to be read to its end.
        """
        stack = ExitStack()
        parts = open_parts(self._path, stack)
        found = next((i for i, (_, file) in enumerate(parts) if self._continues_in(file)), None)
        restarted = self._inode is not None and found is None
        if found is None:
            self._inode, self._offset, self._mark = None, 0, b""
            if self._last_bytes is not None and parts:
                found = len(parts) - 1
                self._begin_near_end(parts[-1][1], self._last_bytes)
        self._last_bytes = None
        return restarted, self._read(stack, [file for _, file in parts[found or 0 :]])

    def _begin_near_end(self, file: IO[bytes], last_bytes: int) -> None:
        start = max(0, os.fstat(file.fileno()).st_size - last_bytes)
        file.seek(start)
        if start:
            start += len(file.readline())  # a whole line is the next one
        self._inode, self._offset = os.fstat(file.fileno()).st_ino, start

    def _continues_in(self, file: IO[bytes]) -> bool:
        status = os.fstat(file.fileno())
        return (
            status.st_ino == self._inode
            and status.st_size >= self._offset
            and os.pread(file.fileno(), len(self._mark), self._offset - len(self._mark))
            == self._mark
        )

    def _read(self, stack: ExitStack, files: list[IO[bytes]]) -> Iterator[bytes]:
        with stack:
            for file in files:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset, self._mark = inode, 0, b""
                start = self._offset
                file.seek(start)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written
                    self._offset += len(line)
                    yield line
                if self._offset > start:
                    size = min(MARK_BYTES, self._offset)
                    self._mark = os.pread(file.fileno(), size, self._offset - size)
