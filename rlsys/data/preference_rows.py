"""Rows of preference training: a prompt with a chosen and a rejected answer, or with a label."""

from __future__ import annotations

from typing import Any, NamedTuple

from rlsys.data.formats import PROMPT_COLUMNS, Reading, finish_row, read_row, refuse_media
from rlsys.data.row import Row
from rlsys.data.targets import (
    LOSS,
    add_answer,
    answer_text,
    leave_out,
    parse_sample,
    targets_of,
)
from rlsys.data.turns import is_turn, read_turns
from rlsys.json_text import BadRow, parse_cell, parsed_or_same
from rlsys.types import Message

CHOSEN, REJECTED, LABEL = "chosen", "rejected", "label"
"""TRL's columns."""
REJECTED_ANSWERS = ("rejected_response", "rejected_messages")
"""ms-swift's columns beside `messages` with the chosen answer."""
_ANSWERS = (CHOSEN, REJECTED, *REJECTED_ANSWERS)
_WANTED = (
    "a row needs `chosen` and `rejected` with a `prompt` (TRL), or `messages` and "
    "`rejected_response` (ms-swift)"
)


def lacks_pair(columns: list[str]) -> str | None:
    """What is wrong with every row of a dataset with these columns; None if nothing is."""
    if {CHOSEN, REJECTED} <= set(columns) or set(REJECTED_ANSWERS) & set(columns):
        return None
    more = ""
    if LABEL in columns:
        more = ". Single answers with a `label` are for preference.loss_type kto"
    return f"has no pairs of answers: {_WANTED}; it has {', '.join(columns)}{more}"


def lacks_label(columns: list[str]) -> str | None:
    """As `lacks_pair`, of rows with a label."""
    if LABEL in columns and set(PROMPT_COLUMNS) & set(columns):
        return None
    more = ""
    if lacks_pair(columns) is None:
        more = ". Pairs of answers are for preference.loss_type sigmoid and others"
    return (
        "has no labels: with preference.loss_type kto a row needs `prompt`, `completion` and "
        f"`label`, true or false; it has {', '.join(columns)}{more}"
    )


def parse_pair(row: Row, *, system: str | None) -> None:
    """Turn the columns of a row into two conversations with their targets.

    Args:
        row: with all its columns; becomes the chosen conversation, and gets `rejected`.
        system: put before rows without a system message; None adds nothing.

    Raises:
        BadRow: as `parse_sample`; no pair, or more than one; answers that are the same, or to
            different prompts.
    """
    refuse_media(row.columns)
    reading, rejected, first = _read_pair(row)
    leave_out(row, *_ANSWERS)
    if reading.messages == rejected:
        said = " ".join(rejected[-1]["content"].split()) if rejected else ""
        raise BadRow(
            f"the chosen and the rejected answer are the same, {said!r:.60}: there is nothing to "
            "prefer. Leave the row out"
        )
    if first is None:
        first = _num_common(reading.messages, rejected)
    _check_prompt(reading.messages[:first])
    number = len(reading.messages)
    finish_row(row, reading, system=system)
    added = len(row.messages) - number
    other = Row(row.number, row.location, format=row.format)
    other.tools, other.template_kwargs = row.tools, row.template_kwargs
    other.messages = row.messages[:added] + rejected
    if row.completion is not None:
        other.text, other.completion = row.text, rejected[-1]["content"]
    for one, what in ((row, CHOSEN), (other, REJECTED)):
        try:
            one.targets = targets_of(one.messages, first + added, "all")
        except BadRow as error:
            raise BadRow(f"the {what} answer: {error}") from None
        one.messages = [{k: v for k, v in m.items() if k != LOSS} for m in one.messages]
    row.rejected = other


def parse_labelled(row: Row, *, system: str | None) -> None:
    """Turn the columns of a row into a conversation with its targets and its label.

    Raises:
        BadRow: as `parse_sample`; a label that is not true or false.
    """
    label = row.columns.get(LABEL)
    if label is None:
        raise BadRow(lacks_label(list(row.columns)) or f"has no {LABEL!r}: true or false")
    if not isinstance(label, bool):
        raise BadRow(f"the column {LABEL!r} is {label!r:.40}: true (desirable) or false")
    leave_out(row, LABEL)
    conversations = [name for name in PROMPT_COLUMNS if name not in ("prompt", "query")]
    has_earlier_answers = any(row.columns.get(name) is not None for name in conversations)
    parse_sample(row, system=system, loss_on="last" if has_earlier_answers else "all")
    row.label = label


class _Found(NamedTuple):
    """A pair as it stands in the columns of a row."""

    reading: Reading
    """With the chosen conversation."""
    rejected: list[Message]
    num_prompt: int | None
    """Messages of the prompt, which are not trained on. None: two whole conversations, whose prompt
    is what both begin with."""


def _read_pair(row: Row) -> _Found:
    """The pair of a row, in the one format that it has."""
    given = [name for name in _ANSWERS if row.columns.get(name) is not None]
    if given == [CHOSEN, REJECTED]:
        return _read_trl(row)
    if len(given) == 1 and given[0] in REJECTED_ANSWERS:
        return _read_swift(row, given[0])
    if set(given) & set(REJECTED_ANSWERS):
        raise BadRow(
            f"has answers in {', '.join(given)}, which are not one pair: keep `chosen` and "
            "`rejected`, or one of `rejected_response` and `rejected_messages`"
        )
    columns = ", ".join(row.columns) or "none"
    raise BadRow(f"has no pair of answers: {_WANTED}; it has {columns}")


def _read_swift(row: Row, name: str) -> _Found:
    """The pair of a row with the chosen conversation in `messages`, or in another format."""
    value = row.columns[name]
    reading = read_row(row)
    add_answer(row, reading)
    messages = reading.messages
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow(
            "the conversation does not end with a turn of the assistant, which is the chosen "
            f"answer beside {name}"
        )
    if name == "rejected_messages":
        row.completion = None
        return _Found(reading, read_turns(parse_cell(value, name)), None)
    said = {"role": "assistant", "content": answer_text(value, name)}
    return _Found(reading, [*messages[:-1], said], len(messages) - 1)


def _read_trl(row: Row) -> _Found:
    """The pair of a row with chosen and rejected answers, or whole conversations."""
    values = row.columns
    chosen, rejected = (_turns_or_text(values[name]) for name in (CHOSEN, REJECTED))
    whole = [_is_conversation(cell) for cell in (chosen, rejected)]
    has_prompt = any(values.get(name) is not None for name in PROMPT_COLUMNS)
    if all(whole):
        messages = read_turns(chosen)
        used = _repeated_prompt(row, messages) if has_prompt else ()
        row.format = "chosen-rejected"
        return _Found(Reading(CHOSEN, messages, False, used), read_turns(rejected), None)
    if any(whole):
        raise BadRow("one of chosen and rejected is a whole conversation, and the other an answer")
    if not has_prompt:
        raise BadRow(
            "has no prompt, and chosen and rejected are no whole conversations: give the prompt in "
            "a column `prompt`, and the answers alone in chosen and rejected. A data.preprocessor "
            "can split texts that begin with their prompt"
        )
    reading = read_row(row)
    prompt = list(reading.messages)
    reading.messages.extend(_answer(chosen, CHOSEN))
    others = _answer(rejected, REJECTED)
    if reading.is_text and isinstance(chosen, str) and isinstance(rejected, str):
        row.completion = chosen
    return _Found(reading, prompt + others, len(prompt))


def _repeated_prompt(row: Row, conversation: list[Message]) -> tuple[str, ...]:
    """Columns with a prompt beside a whole conversation, which only repeat turns of it."""
    given = read_row(row)
    known = [(message["role"], message["content"].strip()) for message in conversation]
    for message in given.messages:
        if (message["role"], message["content"].strip()) not in known:
            raise BadRow(
                f"the column {given.column!r} has {_shown([message])}, which is not in chosen: "
                "chosen and rejected are whole conversations, with their prompt. Correct it, or "
                "give the column another name with data.columns"
            )
    return given.used


def _turns_or_text(cell: Any) -> Any:
    """The turns in a cell, also as JSON, or as the one turn of LLaMA-Factory; or its text."""
    parsed = parsed_or_same(cell)
    turns = [parsed] if is_turn(parsed) else parsed
    return turns if isinstance(turns, list) and turns and all(map(is_turn, turns)) else cell


def _is_conversation(cell: Any) -> bool:
    """Whether turns begin with the prompt, and not with an answer."""
    messages = read_turns(cell) if isinstance(cell, list) else []
    return bool(messages) and messages[0]["role"] != "assistant"


def _answer(cell: Any, name: str) -> list[Message]:
    if isinstance(cell, list):
        return read_turns(cell)
    return [{"role": "assistant", "content": answer_text(cell, name)}]


def _num_common(messages: list[Message], others: list[Message]) -> int:
    """Messages that two conversations begin with, so that an answer of each is left."""
    most = max(min(len(messages), len(others)) - 1, 0)
    first = next((i for i in range(most) if messages[i] != others[i]), most)
    ends = messages[first:], others[first:]
    if not all(end and end[0]["role"] == "assistant" for end in ends):
        raise BadRow(
            f"chosen and rejected answer different prompts: message {first + 1} is "
            f"{_shown(ends[0])} in one, and {_shown(ends[1])} in the other. Give both the same "
            "turns up to their answers"
        )
    return first


def _check_prompt(prompt: list[Message]) -> None:
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise BadRow(
            f"the prompt ends with {_shown(prompt[-1:])}; it must end with a turn of the user or "
            "of a tool, which the answers follow"
        )


def _shown(turns: list[Message]) -> str:
    """The first turn, for errors."""
    if not turns:
        return "nothing"
    words = " ".join(turns[0]["content"].split())
    return f"a turn of {turns[0]['role']!r}, {words!r:.60}"
