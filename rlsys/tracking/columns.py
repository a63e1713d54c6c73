"""Text in columns; a word is never cut or broken, on a terminal of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

GAP = 2
"""Spaces between columns."""


def print_lines(console: Console, lines: Sequence[str], style: str = "") -> None:
    """Print lines unchanged; the terminal wraps a word that is too long for it."""
    for line in lines:
        console.print(Text(line.rstrip(), style=style), soft_wrap=True)


def print_wrapped(console: Console, text: str, *, indent: str = "", style: str = "") -> None:
    """Print a paragraph for each line of `text`; its further lines are indented more."""
    further = indent + "    "
    for line in text.splitlines():
        print_lines(console, _wrap(line, console.width, indent, further) or [""], style)


def print_pairs(console: Console, title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Print (name, description) pairs in two columns below a title."""
    console.print()
    console.print(Text(title, style="italic"))
    left = max((len(name) for name, _ in pairs), default=0)
    for row in pairs:
        print_lines(console, columns(row, (left, console.width - left - GAP)))


def columns(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of one table row; after a word wider than its column, cells start a line below."""
    lines: list[str] = []
    top, start = 0, 0
    for cell, width in zip(cells, widths, strict=True):
        wrapped = [part for line in cell.splitlines() for part in _wrap(line, width) or [""]]
        too_long = [i for i, line in enumerate(lines) if i >= top and len(line) > start - GAP]
        top = max(too_long) + 1 if too_long and start else top
        for number, part in enumerate(wrapped, start=top):
            if number == len(lines):
                lines.append("")
            lines[number] = f"{lines[number]:<{start}}{part}"
        start += width + GAP
    return lines


def join_wrapped(items: Sequence[str], separator: str, width: int, indent: str = "    ") -> str:
    """`items` joined by separators, or by line breaks where a line would be too wide."""
    lines: list[str] = []
    for item in items:
        together = f"{lines[-1]}{separator}{item}" if lines else item
        if lines and len(together) <= width:
            lines[-1] = together
        else:
            lines.append(f"{indent}{item}" if lines else item)
    return "\n".join(lines)


def _wrap(text: str, width: int, first: str = "", further: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        max(width, 1),
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
