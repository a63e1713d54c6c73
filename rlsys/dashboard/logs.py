"""The logs of a run, piece by piece."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

PIECE_BYTES = 256 << 10
"""The most of a log in one answer."""
FIRST_BYTES = 64 << 10
"""What is shown of a log at first: its end."""
MOST_LOGS = 1_000
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")
"""Colours and movements of the cursor, for terminals."""


def log_names(folder: Path) -> list[str]:
    """The logs in a folder and below it, by their paths in it; those of roles come first."""
    try:
        found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    except OSError:  # deleted meanwhile
        return []
    return sorted(found, key=lambda name: (name.count("/"), name))[:MOST_LOGS]


def read_log(folder: Path, name: str, offset: int | None) -> dict[str, Any]:
    """A piece of a log.

    Args:
        folder: of the logs.
        name: one of `log_names`.
        offset: the first byte; None is near the end. One after the end is the end.

    Returns:
        `text`, `offset` (its first byte), `next` (the offset to ask for next) and `size`. A text
        ends with a line, but where the log does not; a log that shrank has a smaller `size`.

    Raises:
        ValueError: no log has this name.
    """
    descriptor = _opened(folder, name)
    try:
        size = os.fstat(descriptor).st_size
        is_first = offset is None
        start = max(0, size - FIRST_BYTES) if offset is None else min(offset, size)
        piece = os.pread(descriptor, PIECE_BYTES, start)
    finally:
        os.close(descriptor)
    if is_first and start > 0:  # not half a line
        skipped = piece.find(b"\n") + 1
        piece, start = piece[skipped:], start + skipped
    if (end := piece.rfind(b"\n") + 1) and start + len(piece) < size:
        piece = piece[:end]
    return {
        "name": name,
        "text": _ESCAPES.sub("", piece.decode("utf-8", "replace")),
        "offset": start,
        "next": start + len(piece),
        "size": size,
    }


def _opened(folder: Path, name: str) -> int:
    """The descriptor of a log: not of a name that goes up, nor of a link out of the folder."""
    with suppress(OSError, ValueError):  # ValueError: a null byte
        path = (folder / name).resolve()
        if path.is_file() and path.is_relative_to(folder.resolve()):
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    raise ValueError(f"the run has no log {name!r}")
