"""`rlsys completions RUN`: the completions of a run, by group or by what you search."""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from rlsys.commands.completions_follow import Steps, follow, why_missing
from rlsys.commands.completions_print import best_first, print_group, print_values
from rlsys.records.completions import Completions, Query
from rlsys.rotation import parts
from rlsys.run.folder import RunDir
from rlsys.text import counted
from rlsys.tracking.base import Split

FOLLOW_FROM = 3
"""Recorded groups that `--follow` shows first, as `tail -f` does."""


def main(args: argparse.Namespace) -> None:
    """Show the completions of `args.run_dir`."""
    steps = parse_steps(args.step)
    if args.follow:
        _refuse_with_follow(args)
        return show_new(args.run_dir, steps=steps, limit=args.limit, split=args.split)
    columns = [name for word in args.columns or () for name in word.split(",") if name] or None
    query = Query(
        where=args.where,
        grep=args.grep,
        steps=steps,
        sort=args.sort,
        descending=not args.ascending,
        limit=args.limit,
        latest=True,
        columns=columns,
    )
    if args.format == "text":
        if args.out is not None:
            raise ValueError("--out FILE goes with --format json, csv or parquet")
        return show_completions(args.run_dir, query, split=args.split)
    from rlsys.commands.completions_write import write_completions

    completions = _recorded(RunDir(args.run_dir), args.split)
    count = write_completions(completions, query, args.format, args.out)
    if args.out is not None:
        print(f"{counted(count, 'completion')} in {args.out}", file=sys.stderr)


def parse_steps(text: str | None) -> Steps:
    """First and last step of 12, 10:20, 10: or :20, which includes both; None is open.

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return None, None
    first, colon, last = text.partition(":")
    if all(word.isdecimal() for word in (first, last) if word) and (first or last):
        low = int(first) if first else None
        high = int(last) if last else None
        return (low, high) if colon else (low, low)
    raise ValueError(f"--step {text} should be a step, or first and last step such as 10:20")


def _refuse_with_follow(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name in ("where", "grep", "sort", "columns", "out")}
    others = [f"--{name}" for name, value in given.items() if value is not None]
    others += ["--format"] if args.format != "text" else []
    if others:
        raise ValueError(
            f"--follow shows whole groups as they come, so it does not go with {', '.join(others)}"
        )


def show_new(run_dir: Path, *, steps: Steps, limit: int | None, split: Split) -> None:
    """Print the groups of a run as they finish, until the run ends, is killed, or Ctrl-C.

    Args:
        run_dir: output directory of the run; it need not exist yet.
        steps: only groups of these steps.
        limit: recorded groups to begin with; None is the newest 3.
        split: the kind of completions.

    Raises:
        ValueError: the run never writes such completions, or `limit` is too small.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"--limit {limit} should be 0 or more")
    with suppress(KeyboardInterrupt):  # the way to stop following
        follow(_console(), RunDir(run_dir), split, steps, FOLLOW_FROM if limit is None else limit)


def show_completions(run_dir: Path, query: Query, split: Split = "train") -> None:
    """Print completions to standard output.

    A query without condition and order shows groups, the best completion of a group first, and its
    `limit` counts groups, the newest ones. Else completions stand in the order of the query.

    Args:
        run_dir: output directory of the run.
        query: which completions.
        split: "eval" shows held-out completions, "filtered" those that dynamic sampling left out.

    Raises:
        ValueError: there is nothing to show, or the query is wrong.
    """
    if query.limit is not None and query.limit < 1:
        raise ValueError(f"--limit {query.limit} should be 1 or more")
    completions = _recorded(RunDir(run_dir), split)
    searches = any(value is not None for value in (query.where, query.grep, query.sort))
    by_group = not searches and query.columns is None
    if by_group:
        query = Query(steps=query.steps, groups=query.limit, latest=True)
    rows = completions.query(query).rows
    if not rows:
        raise ValueError(_nothing(completions, query, searches))
    console = _console()
    if query.columns is not None:
        for row in rows:
            print_values(console, row)
        return
    for _, group in itertools.groupby(rows, key=lambda row: (row["step"], row["group_id"])):
        shown = list(group)
        print_group(console, best_first(shown) if by_group else shown, chosen=searches)


def _recorded(run: RunDir, split: Split) -> Completions:
    path = run.completions_of(split)
    if not any(part.exists() for part in parts(path)):
        raise ValueError(f"{path} does not exist: {why_missing(run, split)}.")
    return Completions(run, split)


def _nothing(completions: Completions, query: Query, searches: bool) -> str:
    found = completions.steps()
    recorded = "it is empty so far" if found is None else f"it has steps {found[0]} to {found[1]}"
    first, last = query.steps
    of_steps = "" if first == last is None else f" of step {first}"
    if first != last:
        of_steps = f" of steps {first or ''}:{last or ''}"
    what = "completion that fits" if searches else "group"
    return f"{completions.path} holds no {what}{of_steps}: {recorded}."


def _console() -> Console:
    # Completions may contain characters that the terminal's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(markup=False, highlight=False, emoji=False)
