"""Rows for supervised training: whole conversations, and the turns whose loss is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rlsys.config.prompt_template import template_columns
from rlsys.data.formats import (
    TEXT,
    Reading,
    fill_template,
    finish_row,
    read_row,
    refuse_media,
)
from rlsys.data.row import Row
from rlsys.data.turns import read_turns
from rlsys.json_text import BadRow, check_unicode, parse_cell
from rlsys.model.answer_spans import THINKING_KEYS
from rlsys.types import Message

LossOn = Literal["all", "last", "flag"]
"""Which turns of the assistant are trained on where the row does not say it itself."""
COMPLETION = "completion"
"""The column behind a `prompt`, as in TRL."""
LOSS = "loss"
"""The key of a message that says whether it is trained on, as in ms-swift."""
_COMPLETIONS = (COMPLETION, "response", "output")
"""Columns that may hold the completion of a prompt made by data.prompt_template."""
_NAMES = {"{{NAME}}": "model_name", "{{AUTHOR}}": "model_author"}
"""ms-swift's placeholders of self-cognition, and the fields of `data` with their values."""
_LANGUAGES = ("zh", "en")


def parse_sample(
    row: Row, *, system: str | None, loss_on: LossOn = "all", template: str | None = None
) -> None:
    """Turn the columns of a row into a conversation with its targets.

    Args:
        row: with all its columns; gets format, messages, targets, tools and template_kwargs.
        system: put before rows without a system message; None adds nothing.
        loss_on: the turns to train on; a turn's own `loss` comes before it.
        template: data.prompt_template, which makes a plain prompt before the completion.

    Raises:
        BadRow: as `parse_row`; no turn of the assistant, or an empty one; a wrong `loss`.
    """
    if template is not None:
        refuse_media(row.columns)
        name = next((n for n in _COMPLETIONS if row.columns.get(n) is not None), None)
        if name is None:
            raise BadRow(f"has nothing to train on: none of {', '.join(_COMPLETIONS)} is there")
        completion = answer_text(row.columns[name], name)
        fill_template(row, template)
        leave_out(row, name, *template_columns(template))
        row.completion = completion
        row.messages.append({"role": "assistant", "content": completion})
        row.targets = [len(row.messages) - 1]
        return
    reading = read_row(row)
    first = add_answer(row, reading)
    if not reading.messages:
        raise BadRow("the conversation is only an empty system message")
    number = len(reading.messages)
    finish_row(row, reading, system=system)
    first += len(row.messages) - number
    row.targets = targets_of(row.messages, first, loss_on)
    row.messages = [{k: v for k, v in m.items() if k != LOSS} for m in row.messages]


def parse_text(row: Row) -> None:
    """Turn a row with a column `text` into a text of which every token is trained on.

    A conversation that is only one turn of the assistant is its text, as ms-swift has it.

    Raises:
        BadRow: no text, or an empty one.
    """
    values = row.columns
    refuse_media(values)
    given = values.get(TEXT)
    if given is None and values.get("messages") is not None:
        messages = read_turns(parse_cell(values["messages"], "messages"))
        if [message["role"] for message in messages] == ["assistant"]:
            given = messages[0]["content"]
    if given is None:
        raise BadRow(
            f"has no column {TEXT!r}, which sft.objective pretrain reads; it has "
            f"{', '.join(values) or 'none'}. Name the column with data.columns: {{NAME: {TEXT}}}"
        )
    row.format, row.text, row.is_raw = TEXT, answer_text(given, TEXT), True
    leave_out(row, TEXT, "messages")


def fill_names(row: Row, names: dict[str, list[str]]) -> set[str]:
    """Put the model's name and author in place of {{NAME}} and {{AUTHOR}} in a parsed row.

    Args:
        row: its column `tag`, zh or en, chooses between two values.
        names: by field, model_name and model_author, for Chinese and English or for both.

    Returns:
        the fields whose placeholder the row has.

    Raises:
        BadRow: a placeholder without a value, or two values and no tag that chooses.
    """
    texts = [message["content"] for message in row.messages]
    texts += [text for text in (row.text, row.completion) if text is not None]
    found = {p: field for p, field in _NAMES.items() if any(p in text for text in texts)}
    for placeholder, field in found.items():
        tag = row.columns.get("tag")
        value = _in_language(names.get(field, []), tag, placeholder, field)
        row.messages = [
            message | {"content": message["content"].replace(placeholder, value)}
            for message in row.messages
        ]
        if row.text is not None:
            row.text = row.text.replace(placeholder, value)
        if row.completion is not None:
            row.completion = row.completion.replace(placeholder, value)
    if found:
        leave_out(row, "tag")
    return set(found.values())


def _in_language(values: Sequence[str], tag: Any, placeholder: str, field: str) -> str:
    if not values:
        raise BadRow(
            f"has the placeholder {placeholder}, and data.{field} is not set: set it, with one "
            "value, or with one for Chinese and one for English"
        )
    if len(set(values)) == 1:
        return values[0]
    if tag not in _LANGUAGES:
        raise BadRow(
            f"the column 'tag' is {tag!r:.40}: with two values in data.{field} it must be "
            f"{' or '.join(_LANGUAGES)}"
        )
    return values[_LANGUAGES.index(tag)]


def add_answer(row: Row, reading: Reading) -> int:
    """Add the answer that stands in a column; returns the first message that may be a target."""
    messages, name = reading.messages, reading.answer_column
    if reading.column != "prompt":
        answer = row.columns.get(name)
        if answer is not None:
            messages.append({"role": "assistant", "content": answer_text(answer, name)})
            leave_out(row, name)
        return 0
    first = len(messages)
    completion = row.columns.get(COMPLETION)
    if completion is None:
        raise BadRow(
            "has a prompt and no column 'completion' to train on. If another column has the "
            "answer, name it with data.columns: {NAME: completion}"
        )
    leave_out(row, COMPLETION)
    if isinstance(completion, str) and not completion.lstrip().startswith("["):
        messages.append({"role": "assistant", "content": answer_text(completion, COMPLETION)})
        if reading.is_text:
            row.completion = completion
    else:
        messages += read_turns(_turns_or_text(completion))
    return first


def leave_out(row: Row, *names: str) -> None:
    """Drop columns that are now part of the conversation; those that are left are not read."""
    row.columns = {name: value for name, value in row.columns.items() if name not in names}


def _turns_or_text(completion: Any) -> Any:
    """The turns in a cell, or the turn of a text that merely begins with a bracket."""
    if not isinstance(completion, str):
        return completion
    try:
        turns = parse_cell(completion, COMPLETION)
    except BadRow:
        turns = None
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        return turns
    return [{"role": "assistant", "content": completion}]


def targets_of(messages: list[Message], first: int, loss_on: LossOn) -> list[int]:
    """The indices of the turns to train on, from message `first` on."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [i for i in answers if i >= first]
    if not answers:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise BadRow(f"has no turn of the assistant to train on, only of {roles}")
    chosen = {"all": answers, "last": answers[-1:], "flag": []}[loss_on]
    targets = []
    for i, message in enumerate(messages):
        flag = _flag(message)
        if flag and i not in answers:
            raise BadRow(
                f"a message of {message['role']!r} has loss true: only turns of the assistant "
                "(behind the prompt) are trained on"
            )
        if i in answers and (i in chosen if flag is None else flag):
            targets.append(i)
    for i in targets:
        message = messages[i]
        says = message["content"].strip() or message.get("tool_calls")
        if not says and not any(message.get(key) for key in THINKING_KEYS):
            raise BadRow(f"message {i + 1}, of the assistant, is empty, and is to be trained on")
    return targets


def _flag(message: Message) -> bool | None:
    flag = message.get(LOSS)
    if flag is None:
        return None
    if flag not in (0, 1) or isinstance(flag, float):
        raise BadRow(f"the {LOSS!r} of a message is {flag!r:.40}: true, false, 1 and 0 are allowed")
    return bool(flag)


def answer_text(value: Any, column: str) -> str:
    """The text in a column.

    Raises:
        BadRow: it is another value, or empty.
    """
    if not isinstance(value, str):
        raise BadRow(f"the column {column!r} is not a text: {value!r:.80}")
    if not value.strip():
        raise BadRow(f"the column {column!r} is empty")
    check_unicode(value)
    return value
