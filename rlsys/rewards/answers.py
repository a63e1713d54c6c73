"""Where the answer stands: in a completion, and in a row of the dataset.

Every search is linear in the length of the text.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rlsys.rewards.base import ORM, check_choice

_log = logging.getLogger(__name__)

AnswerFormat = Literal["any", "tags", "boxed"]
"""Where an answer may stand: in `<answer>` tags, in LaTeX's `\\boxed{}`, or in all places that a
reward documents."""

ANSWER_COLUMNS = ("answer", "solution")
"""Columns of the right answer. A final answer wins over a derivation, which may quote other
numbers than its result."""

# Without braces, a whole number: TeX takes one digit, and models mean the number.
_BOXES = re.compile(
    r"\\{1,2}(?:f?boxed|f(?:rame)?box)(?:\s*(?P<brace>\{)|\s+(?P<bare>[-+]?\d(?:[\d.,/]*\d)?))"
    r"|\\.|[{}]",
    re.DOTALL,
)
# The last line, or above it a number: other such lines are Markdown's headings.
_HASHES = re.compile(r"####[ \t]*([^\n]*?)\s*\Z|####[ \t]*([-+$]*\d[\d.,/]*%?)[ \t]*\n")
_NO_WORDS = re.compile(
    r"\$[^$]*\$|\\\((?:(?!\\[()]).)*\\\)|\\[A-Za-z]+(?:\s*\{[^{}]*\})?", re.DOTALL
)
_SENTENCE_ENDS = re.compile(r"[^\W_][)\"']?[.!?](?:\s+[^\W\d_]|\s*\Z)")
_CHINESE_ENDS = re.compile(r"[\u3002\uff01\uff1f]")
_MOST_WORDS = 4
"""Most lower-case words of an unmarked answer; a name has few: "Lord of the Rings"."""


def after_thinking(completion: str) -> str | None:
    """What follows the last `</think>`; the whole text without thinking.

    None when a `<think>` was never closed: such a completion has not answered yet.
    """
    _, closed, rest = completion.rpartition("</think>")
    return None if "<think>" in rest else rest if closed else completion


def tagged_answers(text: str) -> list[str] | None:
    """The contents of all `<answer>...</answer>`, in order; [] without such tags.

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

    Inside the tags the last `\\boxed{}` counts, if there is one. Several `<answer>`s must be the
    same, so that two that disagree earn nothing.
    """
    text = after_thinking(completion)
    tagged = [] if text is None else tagged_answers(text)
    if text is None or tagged is None:
        return None
    if tagged and where != "boxed":
        found = {boxed if (boxed := last_boxed(one)) is not None else one for one in tagged}
        return found.pop() if len(found) == 1 else None
    return last_boxed(text) if where != "tags" else None


def words_of(text: str) -> list[str]:
    """The words of two letters and more, outside LaTeX."""
    return re.findall(r"[^\W\d_]{2,}", _NO_WORDS.sub(" ", text))


def is_prose(text: str) -> bool:
    """Whether a text is sentences, which may hold many numbers, and not an answer alone."""
    num_lower = sum(word.islower() for word in words_of(text))
    ends = num_lower > 1 and _SENTENCE_ENDS.search(text) is not None
    return ends or num_lower > _MOST_WORDS or _CHINESE_ENDS.search(text) is not None


def marked_gold(text: str) -> str | None:
    """What a text of the dataset marks as its answer; None without a mark.

    The mark is the last `<answer>`, or the last line behind `####` (GSM8K); in these, or else in
    the whole text, the last `\\boxed{}`. Thoughts before `</think>` do not count.
    """
    text = after_thinking(text) or text
    marked = tagged_answers(text) or [last or number for last, number in _HASHES.findall(text)]
    boxed = last_boxed(marked[-1] if marked else text)
    return boxed if boxed is not None else marked[-1].strip() if marked else None


@dataclass(frozen=True, slots=True)
class RightAnswer:
    """The right answer of a row."""

    value: Any
    """The column's value; of a text only what is marked, or else what follows `</think>`."""


def right_answer(
    reward: str,
    row: Mapping[str, Any],
    columns: Sequence[str] = ANSWER_COLUMNS,
    is_final: Callable[[str, str], bool] = lambda column, text: not is_prose(text),
) -> RightAnswer | None:
    """The right answer of one row: the one place that decides which of its columns has it.

    A text counts by its mark, see `marked_gold`, or as a whole where it is an answer alone. A
    derivation without a mark has no answer: the next column is asked.

    Args:
        reward: name of the reward, for the error.
        row: columns of the dataset.
        columns: that may hold it, in order of preference.
        is_final: whether a text without a mark is an answer alone, by its column and the text.

    Returns:
        None where all that the row has is prose.

    Raises:
        ValueError: the dataset has none of the columns.
    """
    there = {column: row[column] for column in columns if column in row}
    if not there:
        raise ValueError(
            f"{reward} needs a dataset column {' or '.join(map(repr, columns))} with the right "
            "answer. Rename yours, or write a preprocessor that does."
        )
    filled = {column: value for column, value in there.items() if not _is_blank(value)}
    for column, value in (filled or there).items():
        if not isinstance(value, str):
            return RightAnswer(value)
        marked = marked_gold(value)
        text = (after_thinking(value) or value).strip()
        if marked is not None or is_final(column, text):
            return RightAnswer(text if marked is None else marked)
    return None


class AnswerReward(ORM):
    """Base of the rewards that compare the answer of a completion with the right one of its row.

    A subclass has `right`, which makes what is compared of a row's value, and `score_answer`. A
    row whose answer is prose is None: not applicable.
    """

    max_reward = 1.0
    reads_think_tags = True
    name: str
    columns: tuple[str, ...] = ANSWER_COLUMNS
    """Dataset columns that may hold the right answer, most preferred first."""

    def __init__(self, answer_format: AnswerFormat):
        """Raises ValueError if `answer_format` is unknown."""
        super().__init__()
        check_choice(self.name, "answer_format", answer_format, get_args(AnswerFormat))
        self.answer_format = answer_format

    def right(self, value: Any) -> Any:
        """What completions are compared with.

        Raises:
            ValueError: `value` cannot be a right answer.
        """
        raise NotImplementedError

    def score_answer(self, completion: str, right: Any) -> float | None:
        """The reward of one completion."""
        raise NotImplementedError

    def is_final(self, column: str, text: str) -> bool:
        """Whether a text of the dataset without a mark is an answer alone."""
        return not is_prose(text)

    def __call__(
        self,
        completions: list[str],
        solution: list[Any] | None = None,
        answer: list[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """[G] 0 to 1, or None where the row has no answer.

        Raises:
            ValueError: a row with an invalid right answer.
        """
        columns |= {"answer": answer, "solution": solution}
        given = {name: columns[name] for name in self.columns if columns.get(name) is not None}
        scores: list[float | None] = []
        for index, completion in enumerate(completions):
            row = {column: values[index] for column, values in given.items()}
            found = self._find_right(row)
            if found is None:
                about = f"all that a row says of its right answer is prose, {row!r:.200}"
                warn_once(self.name, about)
            right = None if found is None else self.right(found.value)
            scores.append(None if right is None else self.score_answer(completion, right))
        return scores

    def check_row(self, row: Mapping[str, Any]) -> None:
        """See ORM: the right answer must exist and be valid."""
        self.gold(row)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """See ORM."""
        found = self._find_right(row)
        return None if found is None else self.right(found.value)

    def _find_right(self, row: Mapping[str, Any]) -> RightAnswer | None:
        return right_answer(self.name, row, self.columns, self.is_final)


def warn_once(name: str, problem: str) -> None:
    """Warn once, of the first row that a reward cannot score."""
    if name not in _warned:
        _warned.add(name)
        _log.warning(
            "%s: %s: its completions are None (not applicable). Further rows are not named; "
            "`rlsys data preview` shows what is read of each", name, problem,
        )  # fmt: skip


@contextmanager
def without_warnings() -> Iterator[None]:
    """Turn `warn_once` off, for a caller that reports such rows itself."""
    _log.disabled = True
    try:
        yield
    finally:
        _log.disabled = False


_warned: set[str] = set()
"""Rewards that have warned in this process."""


def is_missing(value: Any) -> bool:
    """None, or NaN, with which pandas marks a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_blank(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def row_by_row(column: list[Any] | None, other: list[Any] | None) -> list[Any]:
    """The values of `column`, or of `other` where that is empty; either may be missing."""
    if column is None or other is None:
        return column or other or []
    return [second if first is None else first for first, second in zip(column, other, strict=True)]
