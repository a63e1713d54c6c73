"""One row of a file, not yet parsed, and how bytes of a file are read, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rlsys.data.json_text import BadRow, parse_json

MIB = 2**20
_MAGIC = {
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\0",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".zip": b"PK\x03\x04",
    ".parquet": b"PAR1",
}
"""First bytes of binary files."""


@dataclass(slots=True)
class RawRow:
    """One row of a file, parsed only when it is needed."""

    number: int
    """From 1; blank lines do not count."""
    place: str
    """ "line 7" of a text file, "row 7" of another."""
    content: bytes | dict[str, Any]
    """A line of JSON, or the columns."""
    problem: str = ""
    """Why it cannot be read; empty when it can."""

    def values(self) -> dict[str, Any]:
        """The columns of the row, a new dictionary.

        Raises:
            BadRow: it cannot be read.
        """
        if self.problem:
            raise BadRow(self.problem)
        if isinstance(self.content, dict):
            return dict(self.content)
        return json_object(self.content)


def json_object(line: bytes) -> dict[str, Any]:
    """A row that is a line of JSON.

    Raises:
        BadRow: it is another value.
    """
    # Without the line's end, or an error at the end of the line is one of the next line.
    row = parse_json(line.rstrip(b"\r\n"))
    if not isinstance(row, dict):
        raise BadRow(no_object(row))
    return row


def no_object(row: Any) -> str:
    """What is wrong with a row that is something else."""
    return f"expected a JSON object, found {row!r:.80}"


def too_large(limit: int) -> str:
    """What is wrong with a row of more than `limit` bytes."""
    return (
        f"is larger than {limit / MIB:g} MiB: often a line break is missing. If the row is right, "
        "raise data.max_row_mb"
    )


def foreign_content(path: Path) -> str | None:
    """What a file holds instead of rows, where its first bytes tell; None where they do not."""
    with path.open("rb") as file:
        head = file.read(200).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, and not the file itself: fetch it with git lfs pull"
    if head[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not rows: it may be the error page of a download"
    found = next((suffix for suffix, magic in _MAGIC.items() if head.startswith(magic)), None)
    if found is not None and found != path.suffix:
        return f"is a {found} file by its first bytes: rename it, or decompress it"
    return None


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its last suffix.

    Raises:
        ValueError: also while reading, it cannot be decompressed.
    """
    if path.suffix not in _OPENERS:
        with path.open("rb") as file:
            yield file
        return
    try:
        with _OPENERS[path.suffix](path) as compressed:
            yield compressed
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(
            f"{path} cannot be decompressed: {error}. Is it complete, and is its suffix right?"
        ) from error


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
