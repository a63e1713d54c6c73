"""Text files to rows, one at a time, each with the place where it stands.

What is wrong with one row travels with it as `problem`, so that all of them can be reported at
once; what is wrong with a whole file is raised.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlsys.data.json_files import read_json
from rlsys.data.json_text import BadRow
from rlsys.data.raw import MIB, RawRow, open_bytes
from rlsys.data.spec import file_kind

__all__ = ["BadRow", "RawRow", "read_file"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_file(path: Path, *, max_row_mb: int) -> Iterator[RawRow]:
    """The rows of a JSON Lines, JSON, CSV or TSV file.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    limit = max_row_mb * MIB
    return _read_csv(path, limit) if file_kind(path) in _DELIMITERS else read_json(path, limit)


# --- CSV -----------------------------------------------------------------------------------------


def _read_csv(path: Path, limit: int) -> Iterator[RawRow]:
    """Every cell is a text, and an empty one None."""
    csv.field_size_limit(limit)  # of this process; Python's own limit is 128 KiB
    with open_bytes(path) as raw:
        # Bytes that are no UTF-8 travel as lone surrogates to the row that they belong to.
        file = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(file, delimiter=_DELIMITERS[file_kind(path)], strict=True)
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
    with open_bytes(path) as file:
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
