"""Row formats: what people have -> chat turns, and the columns that rewards read.

The first column of `PROMPT_COLUMNS` that a row has decides its format. To add a format, write one
function `_read_<name>` and name it in `_READERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlsys.data.readers import BadRow
from rlsys.rewards import OWN_COLUMNS
from rlsys.types import Message

ROLES = ("system", "user", "assistant", "tool")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
SOLUTION = "solution"
"""The column under which rewards find the answer of a row that has one."""
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A row, understood."""

    messages: list[Message]
    """Ends with a turn of the user."""
    columns: dict[str, Any]
    """Everything that is not part of the prompt, unchanged, and `solution`."""
    format: str
    """Which of the formats it was in."""


@dataclass(slots=True)
class _Reading:
    """What one format makes of a row."""

    turns: Any
    """Not checked yet."""
    used: tuple[str, ...]
    """Columns that are now part of the prompt."""
    answer: Any = None
    """What the row has as the right answer, None if nothing."""
    answer_may_be_last: bool = False
    """Whether a last turn of the assistant is that answer."""


def parse_row(values: dict[str, Any], *, system: str | None) -> ParsedRow:
    """Chat turns and other columns of one row.

    Args:
        values: the row.
        system: put before rows that have no system message; None adds nothing.

    Raises:
        BadRow: no known format, wrong types, no text, or images.
    """
    _refuse_media(values)
    column = next((name for name in PROMPT_COLUMNS if values.get(name) is not None), None)
    if column is None:
        raise BadRow(f"has no prompt: none of {', '.join(PROMPT_COLUMNS)} is there")
    name, read = _READERS[column]
    reading = read(values)
    messages = _checked(reading.turns)
    answer = reading.answer
    if reading.answer_may_be_last and messages[-1]["role"] == "assistant" and len(messages) > 1:
        answer = messages.pop()["content"]
    if messages[-1]["role"] != "user":
        raise BadRow(_wrong_end(column, messages[-1]["role"]))
    own_system = values.get("system")
    if own_system is not None and not isinstance(own_system, str):
        raise BadRow(f"the column 'system' is no text: {own_system!r:.80}")
    system = own_system if own_system and own_system.strip() else system
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    used = {*reading.used, "system", "messages"}
    columns = {name: value for name, value in values.items() if name not in used}
    hidden = columns.keys() & set(OWN_COLUMNS)
    if hidden:
        raise BadRow(f"has the column {min(hidden)!r}, {_HIDDEN}. Rename it")
    if answer is not None and columns.get(SOLUTION) is None:
        columns[SOLUTION] = answer
    return ParsedRow(messages, columns, name)


def columns_problem(columns: list[str]) -> str | None:
    """What is wrong with all rows of a dataset that has these columns; None if nothing is."""
    found = f"It has the columns: {', '.join(columns) or 'none'}"
    if not set(PROMPT_COLUMNS) & set(columns):
        return f"has none of the columns {', '.join(PROMPT_COLUMNS)}. {found}. {_remedy(columns)}"
    reserved = sorted(set(columns) & set(OWN_COLUMNS) - {"messages"})
    if reserved:
        return (
            f"has the column {reserved[0]!r}, {_HIDDEN}. Rename it, for example with data.columns: "
            f"{{{reserved[0]}: dataset_{reserved[0]}}}. {found}"
        )
    return None


def _remedy(columns: list[str]) -> str:
    likely = ("question", "problem", "input", "text", "task", "Question", "Problem")
    name = next((name for name in likely if name in columns), None)
    if name is not None:
        return f"Set data.columns to {{{name}: prompt}}"
    return "Rename one with data.columns, or make prompts with a data.preprocessor"


# --- the formats ---------------------------------------------------------------------------------


def _read_messages(values: dict[str, Any]) -> _Reading:
    turns = _from_json(values["messages"], "messages")
    return _Reading(turns, ("messages",), answer_may_be_last=True)


def _read_sharegpt(values: dict[str, Any]) -> _Reading:
    column = "conversations" if values.get("conversations") is not None else "conversation"
    turns = _from_json(values[column], column)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        turns = [turn for given in turns for turn in _sharegpt_turns(given)]
    return _Reading(turns, (column,), answer_may_be_last=True)


def _sharegpt_turns(given: dict[str, Any]) -> list[dict[str, Any]]:
    """One turn of from and value, or ms-swift's pair of human and assistant."""
    if "human" in given:
        pair = [("user", given["human"]), ("assistant", given.get("assistant"))]
        return [{"role": role, "content": text} for role, text in pair if text is not None]
    if "from" not in given:
        return [given]
    role = _SHAREGPT_ROLES.get(given["from"]) if isinstance(given["from"], str) else None
    if role is None:
        raise BadRow(
            f"a turn is from {given['from']!r:.40}; known are {', '.join(_SHAREGPT_ROLES)}"
        )
    return [{"role": role, "content": given.get("value")}]


def _read_prompt(values: dict[str, Any]) -> _Reading:
    prompt = values["prompt"]
    return _Reading(_user(prompt) if isinstance(prompt, str) else prompt, ("prompt",))


def _read_query(values: dict[str, Any]) -> _Reading:
    turns = [*_history(values), *_user(values["query"])]
    return _Reading(turns, ("query", "history"), answer=values.get("response"))


def _read_alpaca(values: dict[str, Any]) -> _Reading:
    instruction, text = values["instruction"], values.get("input")
    for name, part in (("instruction", instruction), ("input", text)):
        if part is not None and not isinstance(part, str):
            raise BadRow(f"the column {name!r} is no text: {part!r:.80}")
    query = "\n".join(part for part in (instruction, text) if part and part.strip())
    turns = [*_history(values), *_user(query)]
    answer = values["output"] if values.get("output") is not None else values.get("response")
    return _Reading(turns, ("instruction", "input", "history"), answer=answer)


_READERS: dict[str, tuple[str, Callable[[dict[str, Any]], _Reading]]] = {
    "messages": ("messages", _read_messages),
    "conversations": ("sharegpt", _read_sharegpt),
    "conversation": ("sharegpt", _read_sharegpt),
    "prompt": ("prompt", _read_prompt),
    "query": ("query-response", _read_query),
    "instruction": ("alpaca", _read_alpaca),
}
PROMPT_COLUMNS = tuple(_READERS)
"""Columns that hold a prompt, the most specific first."""


def _user(text: Any) -> list[Any]:
    return [{"role": "user", "content": text}]


def _history(values: dict[str, Any]) -> list[Message]:
    """Earlier turns as ms-swift and LLaMA-Factory have them: a list of [query, response]."""
    turns: list[Message] = []
    for pair in _from_json(values.get("history"), "history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"the column 'history' has no list of [query, response]: {pair!r:.80}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _from_json(value: Any, column: str) -> Any:
    """A list that a CSV file holds as a text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRow(f"the column {column!r} is a text that is not JSON: {error}") from None


# --- checks --------------------------------------------------------------------------------------


def _checked(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"expected a list of messages or a prompt, found {turns!r:.80}")
    return [_checked_turn(turn) for turn in turns]


def _checked_turn(turn: Any) -> Message:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise BadRow(
            f"a message is {{'role': one of {', '.join(ROLES)}, 'content': text}}, "
            f"found {turn!r:.80}"
        )
    content = turn.get("content")
    if isinstance(content, list):
        content = _joined_text(content)
    if not isinstance(content, str) or not content.strip():
        kind = "no text" if content is None or isinstance(content, str) else "no text but a value"
        raise BadRow(f"the {turn['role']} message has {kind}: {turn!r:.80}")
    if not content.isascii():
        _refuse_surrogates(content)
    # Parquet gives every message the keys of all, None where it has none.
    kept = {key: value for key, value in turn.items() if value is not None}
    return kept | {"content": content}


def _joined_text(parts: list[Any]) -> str:
    """Content as a list of parts, which may only be text."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRow(f"a message has a part of type {kind!r:.40}: {_ONLY_TEXT}")
        texts.append(str(part.get("text", "")))
    return "".join(texts)


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"a message has {text[error.start]!a}, half of a surrogate pair, which is no character"
        ) from None


_HIDDEN = "a name under which reward functions get something else"
_ONLY_TEXT = "rlsys trains on text alone. Leave such rows out, with a data.preprocessor for example"


def _refuse_media(values: dict[str, Any]) -> None:
    for name in MEDIA_COLUMNS:
        if values.get(name):
            raise BadRow(f"has {name} (the column {name!r} is not empty): {_ONLY_TEXT}")


def _wrong_end(column: str, role: str) -> str:
    if column == "prompt" and role == "assistant":
        return (
            "the prompt ends with a turn of 'assistant', which TRL would let the model continue; "
            "rlsys does not. Leave it out, or name the column messages if it is the answer"
        )
    return (
        f"the messages end with a turn of {role!r}; they must end with the user's, which the "
        "model is to answer"
    )
