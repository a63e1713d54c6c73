"""Where the answer stands: in a completion, and in a row of the dataset.

Shared by the rewards that compare an answer. All of it is linear in the length of the text.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

_log = logging.getLogger(__name__)

AnswerFormat = Literal["any", "tags", "boxed"]
"""Where an answer may stand: in `<answer>` tags, in LaTeX's `\\boxed{}`, or in any of the places
that a reward documents."""

ANSWER_COLUMNS = ("answer", "solution")
"""Where a row's right answer stands. A final answer goes before a derivation, which may quote
other numbers than its result."""

# Without braces, a whole number: TeX takes one digit, and models mean the number.
_BOXES = re.compile(
    r"\\{1,2}(?:f?boxed|f(?:rame)?box)(?:\s*(?P<brace>\{)|\s+(?P<bare>[-+]?\d(?:[\d.,/]*\d)?))"
    r"|\\.|[{}]",
    re.DOTALL,
)
# As the last line; above it, only a number: Markdown has headings of that kind.
_HASHES = re.compile(r"####[ \t]*([^\n]*?)\s*\Z|####[ \t]*([-+$]*\d[\d.,/]*%?)[ \t]*\n")
_NO_WORDS = re.compile(
    r"\$[^$]*\$|\\\((?:(?!\\[()]).)*\\\)|\\[A-Za-z]+(?:\s*\{[^{}]*\})?", re.DOTALL
)
_SENTENCE_ENDS = re.compile(r"[^\W_][)\"']?[.!?](?:\s+[^\W\d_]|\s*\Z)")
_CHINESE_ENDS = re.compile(r"[\u3002\uff01\uff1f]")
_MOST_WORDS = 4
"""In lower case, of an answer without a mark; a name has fewer, "Lord of the Rings"."""


def after_thinking(completion: str) -> str | None:
    """What follows the last `</think>`; all of it when nothing is thought.

    None when a `<think>` was opened and never closed: such a completion has not answered yet,
    whatever numbers it went through.
    """
    _, closed, rest = completion.rpartition("</think>")
    return None if "<think>" in rest else rest if closed else completion


def tagged_answers(text: str) -> list[str] | None:
    """The contents of all `<answer>...</answer>`, in order; [] when there is no such tag.

    None when the tags do not pair up: nested, unclosed, or closed twice.
    """
    before, *parts = text.split("<answer>")
    if "</answer>" in before or any(part.count("</answer>") != 1 for part in parts):
        return None
    return [part.partition("</answer>")[0].strip() for part in parts]


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces close; the inner one when nested.

    `\\fbox{...}` is one too, and `\\boxed 42` without braces.
    """
    last: tuple[int, int] | None = None
    open_braces: list[int | None] = []
    for token in _BOXES.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
        elif token[0] == "{":
            open_braces.append(None)
        elif token["brace"]:
            open_braces.append(token.end())
        elif token["bare"]:
            last = token.span("bare")
    return None if last is None else text[slice(*last)].strip()


def marked_answer(completion: str, where: AnswerFormat) -> str | None:
    """The marked answer: in the `<answer>` tags, else in the last `\\boxed{}`; None without one.

    Inside of the tags the last `\\boxed{}` counts where there is one. Several `<answer>`s have to
    be the same, so that two that disagree earn nothing.
    """
    text = after_thinking(completion)
    tagged = [] if text is None else tagged_answers(text)
    if text is None or tagged is None:
        return None
    if tagged and where != "boxed":
        found = {boxed if (boxed := last_boxed(one)) is not None else one for one in tagged}
        return found.pop() if len(found) == 1 else None
    return last_boxed(text) if where != "tags" else None


@dataclass(frozen=True, slots=True)
class RightAnswer:
    """What a row says is right."""

    value: Any
    """As the column has it; of a text what is marked, or else what follows `</think>`."""
    column: str


def words_of(text: str) -> list[str]:
    """Its words of two letters and more, outside of LaTeX."""
    return re.findall(r"[^\W\d_]{2,}", _NO_WORDS.sub(" ", text))


def is_prose(text: str) -> bool:
    """Whether a text is sentences, which may hold many numbers, and no answer alone."""
    num_lower = sum(word.islower() for word in words_of(text))
    ends = num_lower > 1 and _SENTENCE_ENDS.search(text) is not None
    return ends or num_lower > _MOST_WORDS or _CHINESE_ENDS.search(text) is not None


def marked_gold(text: str) -> str | None:
    """What a text of the dataset marks as its answer; None without a mark.

    That is the last `<answer>`, or the last line behind `####` (GSM8K); in these, or else in all of
    it, the last `\\boxed{}`. What is thought before `</think>` does not count.
    """
    text = after_thinking(text) or text
    marked = tagged_answers(text) or [last or number for last, number in _HASHES.findall(text)]
    boxed = last_boxed(marked[-1] if marked else text)
    return boxed if boxed is not None else marked[-1].strip() if marked else None


def right_answer(
    name: str,
    row: Mapping[str, Any],
    *,
    columns: tuple[str, ...] = ANSWER_COLUMNS,
    is_final: Callable[[str, str], bool] | None = None,
) -> RightAnswer | None:
    """The right answer of one row: the one place that decides which of its columns has it.

    A text counts by its mark, see `marked_gold`, or as a whole where it is an answer alone. One
    that is a derivation without a mark has no answer: the next column is asked.

    Args:
        name: of the reward, for the error.
        row: columns of the dataset.
        columns: those that may hold it, the first goes first.
        is_final: of a column and its text without a mark, whether it is an answer alone; None asks
            `is_prose`.

    Returns:
        None where all that the row has is prose.

    Raises:
        ValueError: the dataset has none of the columns.
    """
    there = {column: row[column] for column in columns if column in row}
    if not there:
        raise ValueError(
            f"{name} needs a dataset column {' or '.join(map(repr, columns))} with the right "
            "answer. Rename yours, or write a preprocessor that does."
        )
    filled = {column: value for column, value in there.items() if not _is_blank(value)}
    for column, value in (filled or there).items():
        if not isinstance(value, str):
            return RightAnswer(value, column)
        marked = marked_gold(value)
        if marked is not None:
            return RightAnswer(marked, column)
        text = (after_thinking(value) or value).strip()
        if is_final(column, text) if is_final is not None else not is_prose(text):
            return RightAnswer(text, column)
    return None


def right_answers(
    name: str, num_rows: int, *, is_final: Callable[[str, str], bool] | None = None, **columns: Any
) -> list[RightAnswer | None]:
    """`right_answer` of each row of a call, whose columns are lists, or None for those missing."""
    there = {column: values for column, values in columns.items() if values is not None}
    rows = [{column: values[i] for column, values in there.items()} for i in range(num_rows)]
    answers = [right_answer(name, row, columns=tuple(columns), is_final=is_final) for row in rows]
    if None in answers:
        row = rows[answers.index(None)]
        warn_once(name, f"all that a row says of its right answer is prose, {row!r:.200}")
    return answers


def warn_once(name: str, problem: str) -> None:
    """Warn of the first row that a reward cannot score, and of no further one.

    The start of a run and `rlsys data preview` count them.
    """
    if name not in _warned:
        _warned.add(name)
        _log.warning(
            "%s: %s: its completions are None (not applicable). Further rows are not named; "
            "`rlsys data preview` shows what is read of each", name, problem,
        )  # fmt: skip


@contextmanager
def without_warnings() -> Iterator[None]:
    """For a caller that says itself which rows cannot be scored."""
    _log.disabled = True
    try:
        yield
    finally:
        _log.disabled = False


_warned: set[str] = set()
"""Rewards of this process that named a row."""


def is_missing(value: Any) -> bool:
    """None, or NaN, with which pandas marks a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_blank(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def row_by_row(column: list[Any] | None, other: list[Any] | None) -> list[Any]:
    """What stands in `column`, or where that has nothing in `other`; one of them may be missing.

    Row by row, because the rows of one dataset may have this column and those of another that.
    """
    if column is None or other is None:
        return column or other or []
    return [second if first is None else first for first, second in zip(column, other, strict=True)]


def check_answer_format(reward: str, value: str) -> None:
    """Raises ValueError unless `value` is an AnswerFormat."""
    if value not in get_args(AnswerFormat):
        raise ValueError(
            f"{reward}: answer_format must be one of {', '.join(get_args(AnswerFormat))}, "
            f"not {value!r}"
        )
