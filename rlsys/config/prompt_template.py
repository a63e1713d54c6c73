"""data.prompt_template: a text with the names of columns in braces, `Question: {question}`."""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter
from typing import TYPE_CHECKING

from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.schema import RowsConfig


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Its parts in order: a text, and the column behind it or None.

    Raises:
        ValueError: braces that do not fit, or something else than a column's name in them.
    """
    parts: list[tuple[str, str | None]] = []
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}: write {{{{ and }}}} for braces of the text") from None
    for text, column, form, conversion in parsed:
        is_name = column is None or (column.strip() and not set(column) & {".", "["})
        if not is_name or form or conversion:
            raise ValueError(
                f"{{{column}{'!' + conversion if conversion else ''}{':' + form if form else ''}}} "
                "is not the name of a column in braces, as {question}; write {{ and }} for braces "
                "of the text"
            )
        parts.append((text, column))
    if not any(column for _, column in parts):
        raise ValueError("it names no column, so all prompts would be the same")
    return parts


def template_columns(template: str) -> list[str]:
    """The columns that a template names, each once."""
    return list(dict.fromkeys(column for _, column in template_parts(template) if column))


def prompt_template_problems(data: RowsConfig) -> Iterator[Problem]:
    """Fields that a prompt without a chat template has no place for."""
    unused = [name for name in ("system", "chat_template_kwargs") if getattr(data, name)]
    if data.prompt_template is not None and unused:
        yield Problem(
            f"data.prompt_template writes prompts without the chat template, so data."
            f"{' and data.'.join(unused)} would not be read: leave out the one or the other"
        )
