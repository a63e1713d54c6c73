"""Logs of a run: a file for each actor, logs/policy-0.log, rotated by size."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from rlsys.rotation import older_parts, part_path

MOST_BYTES = 16 << 20
"""Size of a log from which the next lines go to a new file."""
OLDER_PARTS = 4
"""Parts that are kept beside the newest one; older ones are deleted."""
NAME = re.compile(r"(?P<role>[a-z_]+)-(?P<rank>\d+)")
"""The name of an actor in logs and in Ray: role and rank. Ray's may have a number behind it, of
actors that had the name before."""
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
"""At the beginning of each line."""


class LogFile:
    """Appends lines to a log, each with the time, and keeps the newest parts."""

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[bytes] | None = None

    def write(self, lines: Iterable[str]) -> None:
        """Append lines.

        Raises:
            OSError: of the system, such as that the disk is full.
        """
        now = time.strftime(TIME_FORMAT)
        content = "".join(f"{now} {line}\n" for line in lines).encode("utf-8", "backslashreplace")
        file = self._open()
        while content:
            content = content[file.write(content) :]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        if self._file is not None and os.fstat(self._file.fileno()).st_size >= MOST_BYTES:
            self.close()
            older = older_parts(self._path)
            number = int(older[-1].suffixes[-2][1:]) if older else 0
            self._path.rename(part_path(self._path, number + 1))
            for part in older_parts(self._path)[:-OLDER_PARTS]:
                part.unlink(missing_ok=True)
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Completions may be in it, as in completions.jsonl: for its user alone.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            self._file = os.fdopen(descriptor, "ab", buffering=0)
        return self._file


def log_files(folder: Path) -> dict[str, Path]:
    """Actor -> newest part of its log, by role and rank."""
    found = {path.stem: path for path in folder.glob("*.log") if NAME.fullmatch(path.stem)}

    def place(name: str) -> tuple[str, int]:
        role, _, rank = name.rpartition("-")
        return role, int(rank)

    return {name: found[name] for name in sorted(found, key=place)}
