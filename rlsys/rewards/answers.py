"""Where the answer stands in a completion.

Shared by the rewards that compare an answer. All of it is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

AnswerFormat = Literal["any", "tags", "boxed"]
"""Where an answer may stand: in `<answer>` tags, in LaTeX's `\\boxed{}`, or in any of the places
that a reward documents."""

_BRACES = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)


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
    """The content of the last `\\boxed{...}` whose braces close; the inner one when nested."""
    last: tuple[int, int] | None = None
    open_braces: list[int | None] = []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
        elif token[0] == "{":
            open_braces.append(None)
        elif "boxed" in token[0]:
            open_braces.append(token.end())
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


def right_answer(name: str, row: Mapping[str, Any]) -> Any:
    """The right answer of one row of the dataset, from the column that `reference` takes.

    Raises:
        ValueError: the dataset has neither.
    """
    columns = {column: [row[column]] for column in ("solution", "answer") if column in row}
    return reference(name, columns.get("solution"), columns.get("answer"))[0]


def reference(
    name: str, solution: list[Any] | None, answer: list[Any] | None, own: list[Any] | None = None
) -> list[Any]:
    """The dataset's right answers: column `solution`, or `answer` where there is none, row by row.

    Args:
        name: of the reward, for the error.
        solution: the column `solution`.
        answer: the column `answer`.
        own: the column that the user named, which then has to be there.

    Raises:
        ValueError: the dataset has none of them.
    """
    if own is not None:
        return own
    if solution is None and answer is None:
        raise ValueError(
            f"{name} needs a dataset column 'solution' (or 'answer') with the right answer. Rename "
            "yours, or write a preprocessor that does."
        )
    return row_by_row(solution, answer)


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
