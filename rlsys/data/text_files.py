"""Text files to rows, one at a time.

A reader writes what is wrong with one row into `Row.problem`, so that all bad rows can be reported
together, and raises for what is wrong with a whole file.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlsys.config.dataset_spec import file_kind
from rlsys.data.file_bytes import MIB, open_bytes
from rlsys.data.json_files import read_json
from rlsys.data.row import Row

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_file(path: Path, *, max_row_mb: int) -> Iterator[Row]:
    """The rows of a JSON Lines, JSON, CSV or TSV file.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    limit = max_row_mb * MIB
    return _read_csv(path, limit) if file_kind(path) in _DELIMITERS else read_json(path, limit)


def _read_csv(path: Path, limit: int) -> Iterator[Row]:
    """The rows of a CSV file: every cell is a text, and an empty one None."""
    csv.field_size_limit(limit)  # of this process; Python's own limit is 128 KiB
    with open_bytes(path) as raw:
        # Bytes that are not UTF-8 travel as lone surrogates to the row that they belong to.
        file = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(file, delimiter=_DELIMITERS[file_kind(path)], strict=True)
        header = _header(path, reader)
        for number, (line, cells, problem) in enumerate(_csv_rows(reader), start=1):
            row = Row(number, f"line {line}", problem=problem or _problem(header, cells))
            if not row.problem:
                pairs = zip(header, cells, strict=True)
                row.columns = {name: cell or None for name, cell in pairs if name}
            yield row


def _problem(header: list[str], cells: list[str]) -> str:
    if len(cells) != len(header):
        return f"has {len(cells)} cells, and the header {len(header)}"
    text = "".join(cells)
    escaped = [] if text.isascii() else [c for c in text if "\udc80" <= c <= "\udcff"]
    if escaped:
        byte = ord(escaped[0]) - 0xDC00
        return f"is not a text in UTF-8: it has the byte {byte:#04x}; convert the file to UTF-8"
    for number, (name, cell) in enumerate(zip(header, cells, strict=True), start=1):
        if cell and not name and number > 1:  # pandas writes the index as a first column
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
    """The first line, cells and problem of each row that is not blank."""
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
