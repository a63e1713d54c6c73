"""The table at the end of a run: phases, actors, and what to change first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlsys.timeline.advice import RunFacts, advise
from rlsys.timeline.shares import TimeShares

SHOWN_ACTORS = 32
"""With more actors the table has one row a role."""


def summary_text(shares: TimeShares, run: RunFacts, speeds: Mapping[str, float]) -> str:
    """Where the time went, in Markdown that reads well in a terminal.

    Args:
        shares: of at least one step.
        run: what advice needs to know.
        speeds: tokens a second by what they are, as in "completion tokens".
    """
    first, last = min(shares.steps), max(shares.steps)
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    per_step = shares.seconds / len(shares.steps)
    lines = [f"Where the time went, {steps}: {shares.seconds:.1f} s, {per_step:.2f} s a step", ""]
    phases = sorted(shares.phases.items(), key=lambda item: -item[1])
    rows = [
        (name, f"{seconds:.1f}", f"{seconds / len(shares.steps):.3f}", _percent(shares, seconds))
        for name, seconds in phases
        if seconds
    ]
    lines += _table(("phase", "seconds", "a step", "share"), rows)
    lines += ["", *_table(("actor", "busy", "idle"), _actor_rows(shares)), ""]
    lines += [f"{name} a second: {value:,.0f}" for name, value in speeds.items()]
    if (limit := shares.limited_by) is not None:
        lines.append(f"limited by: {limit}, {_percent(shares, shares.limits[limit])}")
    lines.append(f"change first: {advise(shares, run)}")
    return "\n".join(lines) + "\n"


def _actor_rows(shares: TimeShares) -> list[tuple[str, ...]]:
    if len(shares.actors) > SHOWN_ACTORS:
        idle = shares.idle_shares()
        return [(role, f"{1 - share:.0%}", f"{share:.0%}") for role, share in idle.items()]
    return [
        (name, f"{1 - shares.idle_share(name):.0%}", f"{shares.idle_share(name):.0%}")
        for name in sorted(shares.actors, key=lambda name: (shares.actors[name].role, name))
    ]


def _percent(shares: TimeShares, seconds: float) -> str:
    return f"{shares.share(seconds):.1%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are numbers."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(head), f"| {' | '.join(rule)} |", *(line(row) for row in rows)]
