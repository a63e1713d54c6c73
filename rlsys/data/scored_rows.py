"""Rows for a score head: pairs of answers, and texts or conversations with a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsys.config.prompt_template import template_columns
from rlsys.data.formats import (
    PROMPT_COLUMNS,
    TEXT,
    fill_template,
    finish_row,
    read_row,
    refuse_media,
)
from rlsys.data.preference_rows import CHOSEN, LABEL, REJECTED, parse_pair
from rlsys.data.row import Row
from rlsys.data.targets import COMPLETION, add_answer, answer_text, leave_out
from rlsys.json_text import BadRow, parse_cell, parsed_or_same
from rlsys.text import counted

if TYPE_CHECKING:
    from rlsys.config import RewardModelConfig

MARGIN = "margin"
"""TRL's column: by how much the chosen answer is better."""
_LARGEST = 1e18
"""Squares of larger numbers, which losses have, come near the end of float32."""


@dataclass(frozen=True, slots=True)
class ScoreRules:
    """What is learned of each row."""

    problem_type: str = "preference"
    num_labels: int = 1
    label_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RewardModelConfig) -> ScoreRules:
        """The rules of a run."""
        section = config.reward_model
        return cls(section.problem_type, config.num_labels, tuple(section.label_names))

    @property
    def has_pairs(self) -> bool:
        """Whether a row is two answers."""
        return self.problem_type == "preference"

    @property
    def classes(self) -> str:
        """The labels that a row may have, for errors."""
        last = self.num_labels - 1
        numbers = "0 or 1" if last == 1 else f"0 to {last}"
        return numbers + (f", or {', '.join(self.label_names)}" if self.label_names else "")


PAIRS = ScoreRules()


def parse_pair_with_margin(row: Row, *, system: str | None) -> None:
    """Turn the columns of a row into two conversations, or two texts, and their margin.

    Args:
        row: with all its columns; becomes the chosen conversation, and gets `rejected`, `labels`.
        system: put before rows without a system message; None adds nothing.

    Raises:
        BadRow: as `parse_pair`; a margin that is not a number.
    """
    margin = row.columns.get(MARGIN)
    row.labels = (0.0 if margin is None else _number(margin, MARGIN),)
    leave_out(row, MARGIN)
    values = row.columns
    both = [values.get(name) for name in (CHOSEN, REJECTED)]
    has_prompt = any(values.get(name) is not None for name in PROMPT_COLUMNS)
    if has_prompt or not all(isinstance(text, str) and not _is_json(text) for text in both):
        parse_pair(row, system=system)
        return
    # TRL's pairs of plain texts, which have their prompt inside.
    refuse_media(values)
    chosen, rejected = (answer_text(values[name], name) for name in (CHOSEN, REJECTED))
    if chosen == rejected:
        raise BadRow(
            f"the chosen and the rejected text are the same, {' '.join(chosen.split())!r:.60}: "
            "there is nothing to prefer. Leave the row out"
        )
    row.rejected = Row(row.number, row.location, format=TEXT, text=rejected, is_raw=True)
    row.format, row.text, row.is_raw = TEXT, chosen, True
    leave_out(row, CHOSEN, REJECTED)


def parse_labelled_text(
    row: Row, rules: ScoreRules, *, system: str | None, template: str | None = None
) -> None:
    """Turn the columns of a row into a text or a conversation, and its label.

    Args:
        row: with all its columns; gets `labels` and what `parse_row` sets.
        rules: which labels there are.
        system: put before conversations without a system message; None adds nothing.
        template: data.prompt_template, which makes a text of columns; None reads the row's format.

    Raises:
        BadRow: as `parse_row`; no label, or one that the run does not have.
    """
    label = row.columns.get(LABEL)
    if label is None:
        raise BadRow(
            f"has no column {LABEL!r}, which says what is learned: {_wanted(rules)}. If another "
            f"column has it, name it with data.columns: {{NAME: {LABEL}}}"
        )
    row.labels = read_label(label, rules)
    leave_out(row, LABEL)
    refuse_media(row.columns)
    if template is not None:
        fill_template(row, template)
        leave_out(row, *template_columns(template))
        return
    if row.columns.get(TEXT) is not None:
        row.format, row.is_raw = TEXT, True
        row.text = answer_text(row.columns[TEXT], TEXT)
        leave_out(row, TEXT)
        return
    reading = read_row(row)
    if reading.column != "prompt" or row.columns.get(COMPLETION) is not None:
        add_answer(row, reading)
    if not reading.messages:
        raise BadRow("the conversation is only an empty system message")
    finish_row(row, reading, system=system)


def read_label(value: Any, rules: ScoreRules) -> tuple[float, ...]:
    """[L] the number of the class; 0 or 1 for each class; or numbers.

    Raises:
        BadRow: another type, a class that there is not, or another number of numbers.
    """
    if rules.problem_type == "regression":
        given = parsed_or_same(value)
        numbers = given if isinstance(given, list | tuple) else [given]
        if len(numbers) != rules.num_labels:
            raise BadRow(
                f"the column {LABEL!r} has {counted(len(numbers), 'number')}, and "
                f"reward_model.num_labels is {rules.num_labels}: give as many"
            )
        return tuple(_number(number, LABEL) for number in numbers)
    if rules.problem_type == "single_label_classification":
        return (float(_class(value, rules)),)
    chosen = parse_cell(value, LABEL) if isinstance(value, str) else value
    if not isinstance(chosen, list | tuple):
        raise BadRow(f"the column {LABEL!r} is {value!r:.40}: {_wanted(rules)}")
    numbers = [_class(one, rules) for one in chosen]
    if len(set(numbers)) < len(numbers):
        raise BadRow(f"the column {LABEL!r} names a class twice: {value!r:.60}")
    return tuple(float(number in numbers) for number in range(rules.num_labels))


def _class(value: Any, rules: ScoreRules) -> int:
    """The number of a class, from its name or its number, which is a text in CSV."""
    if isinstance(value, str) and value in rules.label_names:
        return rules.label_names.index(value)
    number = parsed_or_same(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise BadRow(f"the column {LABEL!r} has {value!r:.40}: {_wanted(rules)}")
    if not 0 <= number < rules.num_labels:
        raise BadRow(
            f"the column {LABEL!r} has the class {number}, and the run has {rules.num_labels} "
            f"classes, {rules.classes}: raise reward_model.num_labels, or correct the row"
        )
    return number


def _wanted(rules: ScoreRules) -> str:
    if rules.problem_type == "regression":
        return f"a number, or a list of {rules.num_labels}" if rules.num_labels > 1 else "a number"
    if rules.problem_type == "multi_label_classification":
        return f"a list of classes ({rules.classes}) is wanted, [] for none"
    return f"a class is wanted, {rules.classes}"


def _number(value: Any, column: str) -> float:
    """A number, or the text of one, as cells of CSV are."""
    number = parsed_or_same(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise BadRow(f"the column {column!r} has {value!r:.40}: a number is wanted")
    if not abs(number) <= _LARGEST:
        raise BadRow(
            f"the column {column!r} has {value!r:.40}: a finite number is wanted, up to "
            f"{_LARGEST:.0e}"
        )
    return float(number)


def _is_json(text: str) -> bool:
    """Whether a text may be a conversation in a cell of CSV."""
    return text.lstrip().startswith(("[", "{"))


def lacks_label(columns: Sequence[str], template: str | None) -> str | None:
    """What is wrong with every row of a dataset with these columns; None if nothing is."""
    if LABEL not in columns:
        return (
            f"has no column {LABEL!r}; it has {', '.join(columns)}. Name the column with "
            f"data.columns: {{NAME: {LABEL}}}. Pairs of answers are for reward_model.problem_type "
            "preference"
        )
    if template is None and not {TEXT, *PROMPT_COLUMNS} & set(columns):
        return (
            f"has labels and no text: none of {', '.join((TEXT, *PROMPT_COLUMNS))} is there; it "
            f"has {', '.join(columns)}. Name one with data.columns: {{NAME: {TEXT}}}"
        )
    return None
