"""JSON files to rows: one object a line, a list, objects over several lines, or a wrapped list.

Python's own parser reads them. The JSON reader of `datasets` turns a text such as "2024-01-31" into
a datetime and an integer among floats into a float, and cannot name the line that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rlsys.config.dataset_spec import file_kind
from rlsys.data.file_bytes import MIB, open_bytes, too_large
from rlsys.data.formats import PROMPT_COLUMNS
from rlsys.data.row import Row, json_object, not_an_object
from rlsys.data.turns import is_turn
from rlsys.json_text import BadRow, parse_json, parse_json_values

_BOM = b"\xef\xbb\xbf"
_WANTED = "Rows are objects, one a line or in one list [...]"
_WRAPPERS = ("data", "rows", "examples", "instances", "items", "records", "samples", "train")
"""Keys under which a file has its rows beside other values; a key alone may have any name."""


def read_json(path: Path, limit: int) -> Iterator[Row]:
    """The rows of a JSON or JSON Lines file; rows over `limit` bytes have a problem.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    return _read_lines(path, limit) if is_json_lines(path, limit) else _read_whole(path, limit)


def is_json_lines(path: Path, limit: int = 8 * MIB) -> bool:
    """Whether a file has one row a line, judged by its first two lines.

    Raises:
        ValueError: it cannot be decompressed.
    """
    with open_bytes(path) as file:
        lines = (line for line in _lines(file, limit) if line.strip())
        first, second = islice((*islice(lines, 2), b"", b""), 2)
    try:
        value = parse_json(first.rstrip(b"\r\n"))
    except BadRow:
        begin = first.lstrip()[:1]
        if begin not in (b"{", b"["):
            return True
        if not second:
            return file_kind(path) != ".json"
        return begin == b"{" and _is_object(second)
    try:
        return bool(second) or _rows_of(value) is None
    except BadRow:
        return False  # reading the whole file says what is wrong


def _is_object(line: bytes) -> bool:
    try:
        return bool(json_object(line))
    except BadRow:
        return False


def _read_lines(path: Path, limit: int) -> Iterator[Row]:
    number = 0
    with open_bytes(path) as file:
        for line_number, line in enumerate(_lines(file, limit), start=1):
            if line.strip():
                number += 1
                row = Row(number, f"line {line_number}", line=line)
                if len(line) > limit:
                    row.line, row.problem = b"", too_large(limit)
                yield row


def _lines(file: IO[bytes], limit: int) -> Iterator[bytes]:
    """Lines without a BOM; a line over `limit` bytes is cut to a little more than that."""
    first = True
    while line := file.readline(limit + 2):
        while not line.endswith(b"\n") and len(line) > limit:
            rest = file.readline(limit + 2)
            if not rest or rest.endswith(b"\n"):
                break
        yield line.removeprefix(_BOM) if first else line
        first = False


def _read_whole(path: Path, limit: int) -> Iterator[Row]:
    try:
        with open_bytes(path) as file:
            values = parse_json_values(file.read().removeprefix(_BOM))
        rows = _rows_of(values[0]) if len(values) == 1 else None
    except BadRow as error:
        raise ValueError(f"{path}: {error}. {_WANTED}") from error
    for number, value in enumerate(values if rows is None else rows, start=1):
        row = Row(number, f"row {number}")
        if not isinstance(value, dict):
            row.problem = not_an_object(value)
        # Only a text can be that large, and measuring each row would double the time.
        elif any(isinstance(v, str) and len(v) > limit for v in value.values()):
            row.problem = too_large(limit)
        else:
            row.columns = value
        yield row


def _rows_of(value: Any) -> list[Any] | None:
    """The rows in the only value of a file; None if the value is itself a row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value:
        return None
    if _is_table_of_columns(value):
        raise BadRow(
            f"it holds columns ({', '.join(list(value)[:5])}), as pandas' to_json writes them. "
            "Write rows, with to_json(PATH, orient='records', lines=True)"
        )
    if all(key.isdecimal() and isinstance(row, dict) for key, row in value.items()):
        return list(value.values())  # pandas' orient="index"
    if value.keys() & set(PROMPT_COLUMNS):
        return None
    [(name, inner), *others] = value.items()
    if name in _WRAPPERS and isinstance(inner, dict) and not others:
        return _rows_of(inner)  # {"train": {"data": [...]}}
    lists = {key: rows for key, rows in value.items() if _are_rows(rows)}
    if len(lists) > 1 and len(lists) == len(value):
        raise BadRow(
            f"it holds several lists ({', '.join(lists)}). Write each into a file of its own"
        )
    for key, rows in lists.items():
        if len(value) == 1 or key in _WRAPPERS:
            # The hub's viewer gives {"rows": [{"row_idx": 0, "row": {...}}]}.
            inner = [row.get("row") for row in rows]
            return inner if all(isinstance(row, dict) for row in inner) else rows
    return None


def _are_rows(value: Any) -> bool:
    """Whether it is a list of objects that are rows, not turns of a conversation."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and not is_turn(row) for row in value)
    )


def _is_table_of_columns(value: dict[str, Any]) -> bool:
    columns = list(value.values())
    if value.keys() == {"columns", "index", "data"}:  # orient="split"
        return True
    if all(isinstance(column, dict) and "0" in column for column in columns):
        return True
    prompts = [value[name] for name in PROMPT_COLUMNS if name in value]
    if not prompts or not all(isinstance(column, list) for column in columns):
        return False
    return len(set(map(len, columns))) == 1 and all(
        isinstance(entry, str) for column in prompts for entry in column
    )
