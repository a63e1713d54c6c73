"""JSON with errors that say what is wrong and where."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from typing import Any, NoReturn

from rlsys.text import not_utf8


class BadRow(ValueError):
    """A row, or a text in a row, that cannot be used; the message does not say where it stands."""


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        BadRow: the text is not JSON, repeats a key, or holds half a surrogate pair.
    """
    return _parsed(content, _DECODER.decode)


def parse_json_values(content: bytes | str) -> list[Any]:
    """The values of a JSON text that has several, with nothing but blanks between them.

    Raises:
        BadRow: as `parse_json`.
    """
    return _parsed(content, _decode_all)


def parse_cell(value: Any, column: str) -> Any:
    """The value of a table's cell, which may hold it as text; a blank text is None.

    The text is JSON, or lists and dictionaries as Python prints them and pandas writes them to CSV.

    Raises:
        BadRow: the text is neither.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value)
    except BadRow as error:
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadRow(f"the column {column!r} is a text that is {error}") from None


def parsed_or_same(value: Any) -> Any:
    """The value of a JSON text; anything else, also a text that is not JSON, as it is."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except BadRow:
        return value


def check_unicode(value: Any) -> None:
    r"""Refuse half a surrogate pair, such as "\ud83d" alone, which no tokenizer takes.

    Raises:
        BadRow: a text in `value` has one.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"the text {error.object[max(0, error.start - 20) : error.start]!r} is followed by "
            f"{error.object[error.start]!a}, half of a surrogate pair, which is not a character"
        ) from None


def _parsed(content: bytes | str, decode: Callable[[str], Any]) -> Any:
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = decode(text)
    except UnicodeDecodeError as error:
        raise BadRow(not_utf8(error.object, error.start)) from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {_described(error)}") from None
    except RecursionError:
        raise BadRow("not JSON that can be read: nested too deeply") from None
    except BadRow:
        raise
    except ValueError as error:  # an integer of more digits than Python reads
        raise BadRow(f"not JSON that can be read: {error}") from None
    if "\\ud" in text or "\\uD" in text:  # half of a pair of escapes is not a character
        check_unicode(value)
    return value


def _decode_all(text: str) -> list[Any]:
    values: list[Any] = []
    place = 0
    text = text.strip()
    while place < len(text):
        if values and text[place] not in "[{":
            raise json.JSONDecodeError("Extra data", text, place)
        value, place = _DECODER.raw_decode(text, place)
        values.append(value)
        while place < len(text) and text[place].isspace():
            place += 1
    return values


def _described(error: json.JSONDecodeError) -> str:
    place = f"column {error.colno}"
    if error.lineno > 1:
        place = f"line {error.lineno}, {place}"
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :].strip()
    hint = ""
    if before.endswith(",") and rest[:1] in ("]", "}"):
        hint = "; remove the comma before it"
    elif error.msg == "Extra data" and rest.startswith(","):
        hint = "; objects on lines of their own have no comma between them"
    return f"{error.msg} at {place}{hint}"


def _no_constant(name: str) -> NoReturn:
    raise BadRow(f"not JSON: {name} is not a JSON value; write null or a number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise BadRow(f"not JSON of one meaning: an object has the key {twice!r} twice")
    return found


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_without_duplicates)
