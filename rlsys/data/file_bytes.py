"""The bytes of data files: decompressed, and recognised where they are not rows."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

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


def too_large(limit: int) -> str:
    """The problem of a row of more than `limit` bytes."""
    return (
        f"is larger than {limit / MIB:g} MiB: often a line break is missing. If the row is right, "
        "raise data.max_row_mb"
    )


def foreign_content(path: Path) -> str | None:
    """What a file holds instead of rows, by its first bytes; None if they do not show it."""
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
    """Open a file for reading, decompressed by its last suffix.

    Raises:
        ValueError: it cannot be decompressed; also raised while the caller reads.
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
