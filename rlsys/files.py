"""Files that survive kills: written as a whole, or row by row as JSON lines."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_STEP_FIRST = re.compile(rb'\{"step": (\d{1,15}),.*\}\n', re.DOTALL)
"""A row that begins with its step, as rlsys writes all of them."""


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


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Write a folder as a whole or not at all.

    Yields an empty folder beside it. When the body ends, it becomes `target` in one rename; when
    the body raises, it is removed and `target` stays as it was. A killed process leaves it behind,
    with ".partial" at the end of its name, and the next one to write `target` removes it.
    """
    partial, replaced = (target.with_name(target.name + end) for end in (".partial", ".replaced"))
    if replaced.exists() and not target.exists():  # killed between the two renames below
        replaced.rename(target)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_to_disk(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not target.exists():
        partial.rename(target)
    elif _exchange(partial, target):
        replaced = partial
    else:
        target.rename(replaced)
        partial.rename(target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where system or file system cannot, such as macOS."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_working_directory, exchange = -100, 2  # of Linux's <fcntl.h> and <stdio.h>
    places = (at_working_directory, os.fsencode(one), at_working_directory, os.fsencode(other))
    return renameat2(*places, exchange) == 0


def flush_to_disk(folder: Path) -> None:
    """Return when a folder and its contents survive a crash of the machine."""
    for path in (folder, *folder.rglob("*")):
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def check_writable(folder: Path) -> None:
    """Write a mebibyte into a folder and delete it.

    Raises:
        OSError: of the system, such as that the disk is full.
    """
    with replacing(folder / ".probe") as scratch, scratch.open("wb") as file:
        file.write(bytes(2**20))
        file.flush()
        os.fsync(file.fileno())
    (folder / ".probe").unlink()


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


def free_bytes(place: Path) -> int:
    """Free bytes of the disk that a file or folder is on, or would be on."""
    place = place.absolute()
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free


def size_text(num_bytes: int) -> str:
    """A size for people: "1.5 GiB" or "12.0 MiB"."""
    gib = num_bytes / 2**30
    return f"{gib:,.1f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:,.1f} MiB"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one row a line, in UTF-8; the file is whole or not there.

    Returns:
        The number of rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


class JsonlWriter:
    """Appends rows to a JSONL file.

    The operating system has each row before `append` returns, so a killed process loses none. The
    constructor cuts off a half-written last line of an earlier process.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Append rows together, one line each, or none of them.

        Raises:
            OSError: of the system, such as that the disk is full.
        """
        content = memoryview(b"".join(encode_row(row) for row in rows))
        size = self._file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self._file.truncate(size)  # half a row would hide the next one, too
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def encode_row(row: Mapping[str, Any]) -> bytes:
    """A row as one line of valid JSON: NaN and infinities become null, text stays UTF-8."""
    text = json.dumps(finite(row), ensure_ascii=False, allow_nan=False)
    # Lone surrogates have no UTF-8 form; "backslashreplace" writes them as JSON's own \udXXX.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def decode_row(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None if the line is not a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; a line that is not a JSON object is skipped and logged."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = decode_row(line)
            if row is None:
                logger.warning("%s: line %d is not a JSON object, skipped", path, number)
            else:
                yield row


def drop_torn_line(path: Path) -> None:
    """Add a missing newline after the last row of a file, or cut off half a row."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        start = _start_of_last_line(file.seek(0, os.SEEK_END), file.fileno())
        file.seek(start)
        tail = file.read()
        if not tail or tail.endswith(b"\n"):
            return
        if decode_row(tail) is not None:
            file.write(b"\n")
            return
        logger.warning("%s: dropped a half-written last line of %d bytes", path, len(tail))
        file.truncate(start)


def truncate_after(path: Path, step: int) -> int:
    """Drop the rows of later steps, atomically, before a run continues after `step`.

    Args:
        path: A file of rows with an integer "step". Nothing happens if it does not exist.
        step: The last step to keep.

    Returns:
        The number of lines dropped. A line without an integer "step" is dropped too.
    """
    if not path.exists():
        return 0
    if not _has_later(path, step):
        return 0  # gigabytes of completions are not written again
    dropped = 0
    with replacing(path) as scratch, path.open("rb") as source, scratch.open("wb") as target:
        for line in source:
            row = decode_row(line)
            if row is None or not isinstance(row.get("step"), int) or row["step"] > step:
                dropped += 1
            else:
                target.write(line if line.endswith(b"\n") else line + b"\n")
    return dropped


def _has_later(path: Path, step: int) -> bool:
    """Whether `truncate_after` would drop a line."""
    with path.open("rb") as source:
        for line in source:
            match = _STEP_FIRST.match(line)
            found = int(match[1]) if match else (decode_row(line) or {}).get("step")
            if not line.endswith(b"\n") or not isinstance(found, int) or found > step:
                return True
    return False


def finite(value: Any) -> Any:
    """`value` in JSON's own types; a number that JSON lacks is None."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, Real) and not isinstance(value, int):  # float and numpy's scalars
        return float(value) if math.isfinite(value) else None
    return value


def _start_of_last_line(size: int, descriptor: int) -> int:
    """Offset after the last newline that is not the file's last byte."""
    block_size = 1 << 16
    end = size - 1
    while end > 0:
        begin = max(0, end - block_size)
        newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
