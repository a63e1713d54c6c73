"""Row formats: what people write -> chat turns, and the columns that rewards read.

The first column of `PROMPT_COLUMNS` that a row has decides its format. To add a format, write one
function `_read_<name>` and name it in `_READERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from rlsys.config.prompt_template import template_columns, template_parts
from rlsys.config.rules import OWN_TEMPLATE_ARGUMENTS
from rlsys.data.row import Row
from rlsys.data.turns import (
    ONLY_TEXT,
    SYSTEM_ROLES,
    as_answer,
    as_turns,
    called_functions,
    read_turns,
    user_turn,
)
from rlsys.json_text import BadRow, parse_cell
from rlsys.model.chat_template import read_tools
from rlsys.types import Message

TEMPLATE_FORMAT = "prompt_template"
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
SYSTEM_COLUMNS = ("system", "system_prompt")
"""The row's system message, as in ms-swift."""
TEXT = "text"
"""The column of texts to continue pre-training on, as in TRL."""
SOLUTION = "solution"
"""The column in which rewards find the answer of a row that has one."""


class Reading(NamedTuple):
    """What the format of a row reads in it."""

    column: str
    """The one that decided its format."""
    messages: list[Message]
    is_text: bool
    """Whether the messages are one text of a column `prompt`."""
    used: tuple[str, ...]
    """Columns that are now part of the messages."""
    answer_column: str = ""
    """The column that holds the row's right answer, empty without one."""


class _Found(NamedTuple):
    """What the function of one format returns."""

    turns: Any
    """Not checked yet."""
    used: tuple[str, ...]
    answer_column: str = ""


def parse_row(row: Row, *, system: str | None, template: str | None = None) -> None:
    """Turn the columns of a row into a prompt and the columns that rewards get.

    Args:
        row: with all its columns; gets format, messages, tools and template_kwargs.
        system: put before rows without a system message; None adds nothing.
        template: data.prompt_template, which makes the prompt; None reads the row's format.

    Raises:
        BadRow: no known format, wrong types, no text, or images.
    """
    if template is not None:
        refuse_media(row.columns)
        fill_template(row, template)
        return
    reading = read_row(row)
    messages, calls = reading.messages, []
    answer = row.columns.get(reading.answer_column)
    may_have_answer = row.format in ("messages", "sharegpt") and len(messages) > 1
    if may_have_answer and messages[-1]["role"] == "assistant":
        last = messages.pop()
        answer, calls = as_answer(last), called_functions(last)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise BadRow(_wrong_end(reading.column, messages))
    finish_row(row, reading, system=system)
    if answer is not None and row.columns.get(SOLUTION) is None:
        row.columns[SOLUTION] = answer
    if calls:
        row.columns.setdefault("tool_calls", calls)


def read_row(row: Row) -> Reading:
    """The turns of a row, by its format.

    Raises:
        BadRow: no known format, wrong types, no text, or images.
    """
    values = row.columns
    refuse_media(values)
    column = next((name for name in PROMPT_COLUMNS if values.get(name) is not None), None)
    if column is None:
        raise BadRow(f"has no prompt: none of {', '.join(PROMPT_COLUMNS)} is there")
    row.format, read = _READERS[column]
    turns, used, answer_column = read(values, column)
    is_text = column == "prompt" and turns == user_turn(values[column])
    return Reading(column, read_turns(turns), is_text, used, answer_column)


def finish_row(row: Row, reading: Reading, *, system: str | None) -> None:
    """Set what is read besides the turns: system message, tools, and the columns that are left."""
    values, messages = row.columns, reading.messages
    own_system = _own_system(values)
    system = next(iter(own_system.values()), system)
    if system is not None and messages[0]["role"] not in SYSTEM_ROLES:
        messages.insert(0, {"role": "system", "content": system})
    if reading.is_text:
        row.text = values[reading.column]
    row.messages = messages
    row.tools, row.template_kwargs = read_tools(values.get("tools")), _template_kwargs(values)
    # A system message beside another one stays a column, which the run names as unread.
    unused = {name for name, text in own_system.items() if text != messages[0]["content"]}
    used = {*reading.used, *SYSTEM_COLUMNS, "messages"} - unused
    row.columns = {name: value for name, value in values.items() if name not in used}


def fill_template(row: Row, template: str) -> None:
    """Make the prompt of a row by data.prompt_template."""
    words = []
    for text, column in template_parts(template):
        words.append(text)
        if column is None:
            continue
        value = row.columns.get(column)
        if value is None:
            raise BadRow(
                f"has no column {column!r}, which data.prompt_template names; it has "
                f"{', '.join(row.columns) or 'none'}"
            )
        words.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    row.format, row.text, row.is_raw = TEMPLATE_FORMAT, "".join(words), True
    row.messages = read_turns(user_turn(row.text))
    used = {*template_columns(template)} & {*PROMPT_COLUMNS} | {"messages"}
    row.columns = {name: value for name, value in row.columns.items() if name not in used}


def _own_system(values: dict[str, Any]) -> dict[str, str]:
    """The system messages in the columns of a row, without empty ones."""
    texts = {name: values[name] for name in SYSTEM_COLUMNS if values.get(name) is not None}
    for name, text in texts.items():
        _check_is_text(name, text)
    return {name: text for name, text in texts.items() if text.strip()}


def _template_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    given = parse_cell(values.get("chat_template_kwargs"), "chat_template_kwargs")
    if not given:
        return {}
    if not isinstance(given, dict):
        raise BadRow(
            "the column 'chat_template_kwargs' should hold variables of the chat template, as in "
            f"{{'enable_thinking': false}}, and has {given!r:.80}"
        )
    taken = sorted(given.keys() & set(OWN_TEMPLATE_ARGUMENTS))
    if taken:
        raise BadRow(
            f"the column 'chat_template_kwargs' has {', '.join(taken)}, which rlsys sets itself"
        )
    return given


def columns_problem(columns: list[str], known: tuple[str, ...]) -> str | None:
    """What is wrong with every row of a dataset with these columns; None if nothing is.

    `known` are those of which a row needs one: PROMPT_COLUMNS, or the column of texts.
    """
    if set(known) & set(columns):
        return None
    wanted = TEXT
    likely: tuple[str, ...] = ("content", "document", "raw_content", "body", "Text")
    if "prompt" in known:
        wanted = "prompt"
        likely = ("question", "problem", "input", "text", "task", "Question", "Problem")
    name = next((name for name in likely if name in columns), None)
    remedy = "Rename one with data.columns, or make such rows with a data.preprocessor"
    if name is not None:
        remedy = f"Set data.columns to {{{name}: {wanted}}}"
    return (
        f"has none of the columns {', '.join(known)}. It has the columns: "
        f"{', '.join(columns) or 'none'}. {remedy}"
    )


# --- the formats ---------------------------------------------------------------------------------


def _read_turns(values: dict[str, Any], column: str) -> _Found:
    return _Found(parse_cell(values[column], column), (column,))


def _read_prompt(values: dict[str, Any], column: str) -> _Found:
    prompt = values[column]
    return _Found(as_turns(prompt, column) if isinstance(prompt, str) else prompt, (column,))


def _read_query(values: dict[str, Any], column: str) -> _Found:
    turns = [*_history(values), *as_turns(values[column], column)]
    return _Found(turns, (column, "history"), "response")


def _read_alpaca(values: dict[str, Any], column: str) -> _Found:
    instruction, text = values[column], values.get("input")
    for name, part in ((column, instruction), ("input", text)):
        if part is not None:
            _check_is_text(name, part)
    query = "\n".join(part for part in (instruction, text) if part and part.strip())
    turns = [*_history(values), *as_turns(query, column)]
    answer_column = "response" if values.get("output") is None else "output"
    return _Found(turns, (column, "input", "history"), answer_column)


_READERS: dict[str, tuple[str, Callable[[dict[str, Any], str], _Found]]] = {
    "messages": ("messages", _read_turns),
    "conversations": ("sharegpt", _read_turns),
    "conversation": ("sharegpt", _read_turns),
    "prompt": ("prompt", _read_prompt),
    "query": ("query-response", _read_query),
    "instruction": ("alpaca", _read_alpaca),
}
PROMPT_COLUMNS = tuple(_READERS)
"""Columns that hold a prompt, the most specific first."""


def _history(values: dict[str, Any]) -> list[Message]:
    """Earlier turns in the form of ms-swift and LLaMA-Factory: a list of [query, response]."""
    turns: list[Message] = []
    for pair in parse_cell(values.get("history"), "history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"the column 'history' is not a list of [query, response]: {pair!r:.80}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


# --- checks --------------------------------------------------------------------------------------


def _check_is_text(column: str, value: Any) -> None:
    if not isinstance(value, str):
        raise BadRow(f"the column {column!r} is not a text: {value!r:.80}")


def refuse_media(values: dict[str, Any]) -> None:
    """Refuse a row with images, video or audio.

    Raises:
        BadRow: it has some.
    """
    for name in MEDIA_COLUMNS:
        given = values.get(name)
        if isinstance(given, list):
            given = [entry for entry in given if entry is not None]
        if given and given not in ("[]", "{}"):  # as an empty list looks in a CSV file
            raise BadRow(f"has {name} (the column {name!r} is not empty): {ONLY_TEXT}")


def _wrong_end(column: str, messages: list[Message]) -> str:
    if not messages:
        return "the messages ask nothing: they are only an empty system message"
    role = messages[-1]["role"]
    if column == "prompt" and role == "assistant":
        return (
            "the prompt ends with a turn of 'assistant', which TRL would let the model continue; "
            "rlsys does not. Leave it out, or name the column messages if it is the answer"
        )
    return (
        f"the messages end with a turn of {role!r}; they must end with one of the user or of a "
        "tool, which the model answers"
    )
