"""`rlsys completions RUN`: the completions of each group, with their rewards."""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.text import Text

from rlsys.config.yaml_text import read_yaml
from rlsys.files import decode_row
from rlsys.run.folder import RunDir, State
from rlsys.text import counted
from rlsys.tracking.base import Split
from rlsys.tracking.completions import row_problem
from rlsys.tracking.printable import printable

FOLLOW_FROM = 3
"""Recorded groups that `--follow` shows first, as `tail -f` does."""
SECONDS_BETWEEN_LOOKS = 0.25
ENDS: dict[State | None, str] = {
    "ended": "the run has ended",
    "killed": "the run was killed: its status is running, and no process is in its folder",
}
"""States of a run that end `--follow`, in words."""

logger = logging.getLogger(__name__)
Row = dict[str, Any]


def main(args: argparse.Namespace) -> None:
    """Show the completions of `args.run_dir`."""
    show_completions(
        args.run_dir, follow=args.follow, step=args.step, limit=args.limit, split=args.split
    )


def show_completions(
    run_dir: Path,
    *,
    follow: bool,
    step: int | None,
    limit: int | None,
    split: Split = "train",
) -> None:
    """Print the groups of a run to standard output, the best completion of a group first.

    Args:
        run_dir: output directory of the run; with `follow` it need not exist yet.
        follow: print further groups as they finish, until the run ends, is killed, or Ctrl-C.
        step: only groups of this step; None is every step.
        limit: only the newest `limit` groups; None is all, or the newest 3 with `follow`.
        split: "eval" shows held-out completions, "filtered" those that dynamic sampling left out.

    Raises:
        ValueError: there is nothing to show or to wait for, or `limit` is too small.
    """
    least = 0 if follow else 1
    if limit is not None and limit < least:
        raise ValueError(f"--limit {limit} should be {least} or more")
    run = RunDir(run_dir)
    path = run.completions_of(split)
    # Completions may contain characters that the terminal's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(markup=False, highlight=False, emoji=False)
    try:
        if follow:
            _follow(console, run, split, step, FOLLOW_FROM if limit is None else limit)
        else:
            if not path.exists():
                raise ValueError(f"{path} does not exist: {_why_missing(run, split)}.")
            _show_recorded(console, path, step, limit)
    except KeyboardInterrupt:
        pass  # the way to stop following


def _show_recorded(console: Console, path: Path, step: int | None, limit: int | None) -> None:
    steps: set[int] = set()
    groups: deque[list[Row]] = deque(maxlen=limit)
    for group in GroupReader(path).groups(to_end=True):
        steps.add(group[0]["step"])
        if step in (None, group[0]["step"]):
            groups.append(group)
    if not groups:
        recorded = f"it has steps {min(steps)} to {max(steps)}" if steps else "it is empty so far"
        wanted = "no group" if step is None else f"no group of step {step}"
        raise ValueError(f"{path} holds {wanted}: {recorded}.")
    for group in groups:
        print_group(console, group)


def _follow(console: Console, run: RunDir, split: Split, step: int | None, limit: int) -> None:
    path = run.completions_of(split)
    reader = GroupReader(path)

    def new_groups() -> Iterator[list[Row]]:
        return (group for group in reader.groups() if step in (None, group[0]["step"]))

    for group in deque(new_groups(), maxlen=limit):
        print_group(console, group)
    has_started = _has_recorded(run)  # an attempt that failed before its first step does not count
    if not has_started or not path.exists():
        before = {"ended": "failed", "killed": "was killed"}.get(run.state() or "")
        earlier = f" (an earlier attempt {before} before its first step)" if before else ""
        print(f"waiting for {path}{'' if has_started else earlier}", file=sys.stderr)
    is_checked = False
    while True:
        state = run.state()  # read before the file, so that the last groups are not missed
        has_started = has_started or state == "running" or _has_recorded(run)
        if has_started and not is_checked:
            is_checked = True
            if (never := _why_never(run, split)) is not None:
                raise ValueError(f"nothing to wait for: {never}")
        for group in new_groups():
            print_group(console, group)
        if has_started and state in ENDS:
            print(ENDS[state], file=sys.stderr)
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _has_recorded(run: RunDir) -> bool:
    files = (run.metrics, run.completions, run.eval_completions)
    return any(path.exists() and path.stat().st_size for path in files)


def _why_missing(run: RunDir, split: Split) -> str:
    """Why a file of completions does not exist."""
    if not run.path.is_dir():
        return f"there is no folder {run.path}"
    if not run.config.exists():
        return f"{run.path} is not the output directory of a run"
    never = _why_never(run, split)
    if never is not None:
        return never
    state = run.state()
    what = {"train": "group", "eval": "held-out group", "filtered": "filtered group"}[split]
    if state in ("ended", "killed"):
        return f"the run {'ended' if state == 'ended' else 'was killed'} before its first {what}"
    return f"no {what} has finished yet: --follow waits for it"


def _why_never(run: RunDir, split: Split) -> str | None:
    """The setting that keeps the run from recording these completions; None if it records them."""
    try:
        config = read_yaml(run.config) if run.config.exists() else {}
    except ValueError:
        config = None  # damaged, so it says nothing
    config = config if isinstance(config, dict) else {}

    def setting(section: str, field: str) -> Any:
        inside = config.get(section)
        return inside.get(field) if isinstance(inside, dict) else None

    if "sft" in config:
        return (
            "it is a run of `rlsys sft`, which samples nothing. `rlsys infer RUN` asks its model, "
            "and `rlsys data preview CONFIG` shows what it was trained on"
        )
    if setting("tracking", "log_completions") is False:
        return "tracking.log_completions is off in this run"
    if split == "filtered" and setting("rollout", "dynamic_sample") is False:
        return "only rollout.dynamic_sample filters groups, and it is off in this run"
    if split == "eval" and config.get("eval_steps", 1) is None:
        return "eval_steps is not set in this run, so it evaluates nothing"
    return None


class Tail:
    """The rows of a file that another process appends to, each once."""

    def __init__(self, path: Path):
        self._path = path
        self._position = 0
        self._inode: int | None = None

    def rows(self) -> Iterator[Row]:
        """Rows since the last call; none while the file does not exist.

        A resumed run cuts its file back to its checkpoint. The rows that are left are not new, so
        reading continues at the end of the file.
        """
        if not self._path.exists():
            self._position, self._inode = 0, None
            return
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            replaced = self._inode is not None and self._inode != status.st_ino
            if replaced or status.st_size < self._position:
                self._position = status.st_size
            self._inode = status.st_ino
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written: read again next time
                self._position += len(line)
                row = decode_row(line)
                problem = "it is not a JSON object" if row is None else row_problem(row)
                if row is None or problem is not None:
                    logger.warning("%s: skipped a line: %s", self._path, problem)
                else:
                    yield row


class GroupReader:
    """The groups of a file that another process appends to; rows of a group stand together."""

    def __init__(self, path: Path):
        self._tail = Tail(path)
        self._rows: list[Row] = []

    def groups(self, *, to_end: bool = False) -> Iterator[list[Row]]:
        """The groups since the last call; with `to_end` also an incomplete last one."""
        for row in self._tail.rows():
            if self._rows and any(self._rows[0][key] != row[key] for key in ("step", "group_id")):
                yield self._take()
            self._rows.append(row)
            if len(self._rows) == row["group_size"]:
                yield self._take()
        if to_end and self._rows:
            yield self._take()

    def _take(self) -> list[Row]:
        rows, self._rows = self._rows, []
        return rows


def print_group(console: Console, rows: list[Row]) -> None:
    """Print one group: a heading, the prompt, and the completions from best to worst."""
    first = rows[0]
    title = (
        f"step {first['step']}, group {first['group_id']}, prompt {printable(first['prompt_id'])}"
    )
    console.rule(Text(title, style="bold"), align="left", style="dim")
    console.print(Text(_group_summary(rows)))
    console.print()
    _print_indented(console, first["prompt"], "cyan")
    totals = [row["reward"] for row in rows if row["reward"] is not None]
    for row in sorted(rows, key=_badness):
        style = ""
        if totals and min(totals) < max(totals):  # else no completion is better than another
            style = {max(totals): "bold green", min(totals): "bold red"}.get(row["reward"], "")
        console.print()
        _print_heading(console, row, style)
        _print_indented(console, row["text"] or "(empty)", "" if row["text"] else "dim")
    console.print()


def _group_summary(rows: list[Row]) -> str:
    """Mean and standard deviation of the rewards, and what is missing."""
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


def _badness(row: Row) -> float:
    return math.inf if row["reward"] is None else -row["reward"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
