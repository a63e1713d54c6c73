"""Tables of a page that a script writes, between two comments."""

from __future__ import annotations

END = "<!-- end -->\n"


def with_tables(page: str, tables: dict[str, list[str]], *, script: str) -> str:
    """The page with the lines of each table between its comments.

    Args:
        tables: lines by name; `<!-- NAME: written by SCRIPT -->` begins a table.
        script: path of the script.
    """
    for name, lines in tables.items():
        start = f"<!-- {name}: written by {script} -->\n"
        before, found, rest = page.partition(start)
        _, ended, after = rest.partition(END)
        assert found, f"the page lacks {start}"
        assert ended, f"{start}has no {END}"
        page = before + start + "\n".join(lines) + "\n" + END + after
    return page


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [row(cells) for cells in [head, ["---"] * len(head), *rows]]


def row(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"
