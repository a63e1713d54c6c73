"""Completions of `rlsys completions` for people."""

from __future__ import annotations

import json
import math
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.text import Text

from rlsys.text import counted
from rlsys.tracking.printable import printable

Row = dict[str, Any]


def print_group(console: Console, rows: list[Row], *, chosen: bool = False) -> None:
    """Print completions of one group: a heading, the prompt, and each completion.

    Args:
        console: where to.
        rows: in their order.
        chosen: whether others of the group were left out on purpose.
    """
    first = rows[0]
    title = (
        f"step {first['step']}, group {first['group_id']}, prompt {printable(first['prompt_id'])}"
    )
    console.rule(Text(title, style="bold"), align="left", style="dim")
    console.print(Text(_group_summary(rows, chosen)))
    console.print()
    _print_indented(console, first["prompt"], "cyan")
    totals = [row["reward"] for row in rows if row["reward"] is not None]
    for row in rows:
        style = ""
        if (
            not chosen and totals and min(totals) < max(totals)
        ):  # else no completion is better than another
            style = {max(totals): "bold green", min(totals): "bold red"}.get(row["reward"], "")
        console.print()
        _print_heading(console, row, style)
        _print_indented(console, row["text"] or "(empty)", "" if row["text"] else "dim")
    console.print()


def _group_summary(rows: list[Row], chosen: bool) -> str:
    """Mean and standard deviation of the rewards, and what is missing."""
    if chosen:
        return f"{len(rows)} of {counted(rows[0]['group_size'], 'completion')}"
    parts = []
    if len(rows) < rows[0]["group_size"]:
        parts.append(f"only {len(rows)} of {rows[0]['group_size']} completions on record")
    totals = [row["reward"] for row in rows if row["reward"] is not None]
    if totals:
        spread = f" ± {stdev(totals):.2g}" if len(totals) > 1 else ""
        parts.append(f"reward {mean(totals):.3g}{spread}")
        if len(totals) > 1 and min(totals) == max(totals):
            parts.append("all alike, so nothing to learn from")
    else:
        parts.append("not scored")
    return ", ".join(parts)


def _print_heading(console: Console, row: Row, style: str) -> None:
    line = Text(f"#{row['index']}  ")
    line.append(f"reward {_number(row['reward'])}", style=style)
    failures = row.get("failures", {})  # older runs did not write it
    for name, value in row["rewards"].items():
        line.append(f"  {printable(name)} {_number(value)}")
        if name in failures:
            line.append(f" {printable(failures[name])}", style="bold red")
    advantage = row["advantage"]
    line.append("  advantage " + ("-" if advantage is None else f"{advantage:+.2f}"))
    end = "cut" if row["finish_reason"] == "length" else row["finish_reason"]
    first, *later = row["policy_versions"]
    starts = row.get("version_starts", [])[1:]
    versions = f"{first}" + "".join(
        f", {version} from token {start}" for version, start in zip(later, starts, strict=False)
    )
    line.append(f"  {counted(row['num_tokens'], 'token')}, {end}, policy {versions}", style="dim")
    console.print(line)


def _print_indented(console: Console, text: str, style: str) -> None:
    indent = "    "
    room = max(20, console.width - len(indent))
    for line in Text(printable(text), style=style).wrap(console, room):
        line.rstrip()
        console.print(Text(indent) + line, soft_wrap=True)


def best_first(rows: list[Row]) -> list[Row]:
    """The rows from the highest reward to the lowest, and then those without one."""
    return sorted(rows, key=lambda row: math.inf if row["reward"] is None else -row["reward"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def print_values(console: Console, row: Row) -> None:
    """Print some columns of a completion, one below the other."""
    width = max(map(len, row)) + 2
    for name, value in row.items():
        shown = printable(value if isinstance(value, str) else _number_or_json(value))
        console.print(Text(f"{name:<{width}}", style="dim") + Text(shown), soft_wrap=True)
    console.print()


def _number_or_json(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    return "-" if value is None else json.dumps(value, ensure_ascii=False)
