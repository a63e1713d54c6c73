"""Files to rows, one at a time, each with the place where it stands.

JSON is read by Python's own parser, not through `datasets`, whose JSON reader turns a text such as
"2024-01-31" into a datetime and an integer among floats into a float, and cannot name the line that
is wrong. What is wrong with one row travels with it as `problem`, so that all of them can be told
at once; what is wrong with a whole file is raised.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlsys.data.json_text import BadRow, parse_json

MIB = 2**20
_BOM = b"\xef\xbb\xbf"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


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
        return _json_object(self.content)


def read_file(path: Path, *, max_row_mb: int) -> Iterator[RawRow]:
    """The rows of a JSON Lines, JSON, CSV or TSV file.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    limit = max_row_mb * MIB
    if path.suffix in _DELIMITERS:
        return _read_csv(path, limit)
    if path.suffix == ".json" and _starts_with_bracket(path):
        return _read_json_list(path, limit)
    return _read_json_lines(path, limit)


# --- JSON ----------------------------------------------------------------------------------------


def _read_json_lines(path: Path, limit: int) -> Iterator[RawRow]:
    number = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(_lines(file, limit), start=1):
            if not line.strip():
                continue
            number += 1
            if len(line) > limit:
                yield RawRow(number, f"line {line_number}", b"", _too_large(limit))
                continue
            yield RawRow(number, f"line {line_number}", line)


def _lines(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """Lines without a BOM; of one over `limit` bytes only the start is kept, a little longer."""
    first = True
    while line := file.readline(limit + 2):
        while not line.endswith(b"\n") and len(line) > limit:
            rest = file.readline(limit + 2)
            if not rest or rest.endswith(b"\n"):
                break
        yield line.removeprefix(_BOM) if first else line
        first = False


def _too_large(limit: int) -> str:
    return (
        f"is larger than {limit / MIB:g} MiB: often a line break is missing. If the row is right, "
        "raise data.max_row_mb"
    )


def _read_json_list(path: Path, limit: int) -> Iterator[RawRow]:
    try:
        rows = parse_json(path.read_bytes().removeprefix(_BOM))
    except BadRow as error:
        raise ValueError(f"{path}: {error}") from error
    for number, row in enumerate(rows, start=1):
        problem = "" if isinstance(row, dict) else _no_object(row)
        # Only a text can be that large, and measuring each row would double the time.
        if not problem and any(isinstance(v, str) and len(v) > limit for v in row.values()):
            problem = _too_large(limit)
        yield RawRow(number, f"row {number}", row, problem)


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")


def _json_object(line: bytes) -> dict[str, Any]:
    # Without the line's end, or an error at the end of the line is one of the next line.
    row = parse_json(line.rstrip(b"\r\n"))
    if not isinstance(row, dict):
        raise BadRow(_no_object(row))
    return row


def _no_object(row: Any) -> str:
    return f"expected a JSON object, found {row!r:.80}"


# --- CSV -----------------------------------------------------------------------------------------


def _read_csv(path: Path, limit: int) -> Iterator[RawRow]:
    """Every cell is a text, and an empty one None."""
    csv.field_size_limit(limit)  # of this process; Python's own limit is 128 KiB
    # Bytes that are no UTF-8 travel as lone surrogates to the row that they belong to.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=_DELIMITERS[path.suffix], strict=True)
        header = _header(path, reader)
        for number, (line, cells, problem) in enumerate(_csv_rows(reader), start=1):
            if not problem and len(cells) != len(header):
                problem = f"has {len(cells)} cells, and the header {len(header)}"
            if not problem and not "".join(cells).isascii():
                problem = _escaped_bytes(cells)
            if not problem:
                problem = _unnamed(header, cells)
            values: dict[str, Any] = {}
            if not problem:
                values = {
                    name: cell or None for name, cell in zip(header, cells, strict=True) if name
                }
            yield RawRow(number, f"line {line}", values, problem)


def _unnamed(header: list[str], cells: list[str]) -> str:
    """A cell that no reward could be given; the first one may be the row's index from pandas."""
    for number, (name, cell) in enumerate(zip(header, cells, strict=True), start=1):
        if cell and not name and number > 1:
            return f"has {cell!r:.40} in column {number}, which has no name in the header"
    return ""


def _header(path: Path, reader: Any) -> list[str]:
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(
                f"{path} is not a text in UTF-8 (it looks like UTF-16); convert the file to UTF-8"
            )
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"{path}, line 1: not CSV: {error}") from error
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ValueError(f"{path}, line 1: the column {twice[0]!r} is there twice")
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        raise ValueError(
            f"{path}, line 1: the header has no comma: {header[0]!r:.80}. Cells must be separated "
            "by commas, or by tabs in a .tsv file"
        )
    return header


def _csv_rows(reader: Any) -> Iterator[tuple[int, list[str], str]]:
    """(first line, cells, problem) of each row that is not blank."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], f"not CSV: {error}"
            continue
        if cells:
            yield line, cells, ""


def _escaped_bytes(cells: Iterable[str]) -> str:
    for cell in cells:
        for character in cell:
            if 0xDC80 <= ord(character) <= 0xDCFF:
                return (
                    f"is not a text in UTF-8: it has the byte {ord(character) - 0xDC00:#04x}; "
                    "convert the file to UTF-8"
                )
    return ""
