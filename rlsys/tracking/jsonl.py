"""Files of one JSON object a line that survive kills: append, read, cut back on resume."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from rlsys.files import replacing
from rlsys.tracking.base import Metrics, Tracker

logger = logging.getLogger(__name__)


class JsonlWriter:
    """Appends rows; each is handed to the operating system before `append` returns.

    So a killed process loses nothing that was appended. A half-written last line of an earlier
    process is cut off when the file is opened.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(path)
        self._file = path.open("ab")

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Append rows together, one line each."""
        self._file.write(b"".join(encode_row(row) for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of valid JSON: NaN and infinities become null, text stays readable UTF-8."""
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
    # Lone surrogates have no UTF-8 form; "backslashreplace" writes them as JSON's own \udXXX.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def decode_row(line: bytes) -> dict[str, Any] | None:
    """The object on a line, or None when the line holds none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; a line without one, cut by a kill say, is skipped and logged."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = decode_row(line)
            if row is None:
                logger.warning("%s: line %d is not a JSON object, skipped", path, number)
            else:
                yield row


def drop_torn_line(path: Path) -> None:
    """Make a file end with a whole line: add a missing newline, or cut off half a row."""
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
        path: A file of rows with an integer "step"; a missing file is left missing.
        step: The last step to keep.

    Returns:
        How many lines were dropped, those that hold no such row included.
    """
    if not path.exists():
        return 0
    dropped = 0
    with replacing(path) as scratch, path.open("rb") as source, scratch.open("wb") as target:
        for line in source:
            row = decode_row(line)
            if row is None or not isinstance(row.get("step"), int) or row["step"] > step:
                dropped += 1
            else:
                target.write(line if line.endswith(b"\n") else line + b"\n")
    return dropped


class JsonlTracker(Tracker):
    """metrics.jsonl: one object a step."""

    def __init__(self, path: Path):
        self._writer = JsonlWriter(path)

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Append `{"step": step, ...}`."""
        self._writer.append({"step": step, **metrics})

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _finite(value: Any) -> Any:
    """`value` in JSON's own types, numbers that JSON lacks as None."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
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
