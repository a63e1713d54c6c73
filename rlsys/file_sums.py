"""Sizes and SHA-256 sums of the files in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_THREADS = 4
"""Files that are read at the same time; hashing leaves Python's lock."""


@dataclass(frozen=True, slots=True)
class FileSum:
    """What a file holds, as a manifest lists it."""

    bytes: int
    sha256: str
    """In hexadecimal digits, as `sha256sum` prints it."""


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def sum_files(folder: Path, names: Iterable[str]) -> dict[str, FileSum]:
    """Read files below `folder`; their sums by name."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = threads.map(lambda name: _sum_file(folder / name), names)
        return dict(zip(names, sums, strict=True))


def _sum_file(path: Path) -> FileSum:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSum(file.tell(), digest)
