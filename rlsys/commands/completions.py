"""`rlsys completions RUN`: what the model wrote, siblings side by side with their rewards."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from rlsys.files import decode_row
from rlsys.run.folder import RunDir, State
from rlsys.text import counted
from rlsys.tracking.base import Split
from rlsys.tracking.printable import printable

FOLLOW_FROM = 3
"""Groups that are already there and shown first when following, as `tail -f` does."""
SECONDS_BETWEEN_LOOKS = 0.25
ENDS: dict[State | None, str] = {
    "ended": "the run has ended",
    "killed": "the run was killed: its status is running, and no process is in its folder",
}
"""Of following."""

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
    """Print the groups of a run to standard output, the siblings of a group best first.

    Args:
        run_dir: The output directory of the run; with `follow` it need not exist yet.
        follow: Go on printing groups as they finish, until the run ends, is killed, or Ctrl-C.
        step: Only groups of this step; None is every step.
        limit: The newest so many groups; None is all of them, or the newest 3 when following.
        split: "eval" shows held-out completions, "filtered" those that dynamic sampling left out.

    Raises:
        ValueError: There is nothing to show, or to wait for; or `limit` shows nothing.
    """
    least = 0 if follow else 1
    if limit is not None and limit < least:
        raise ValueError(f"--limit {limit} should be {least} or more")
    run = RunDir(run_dir)
    path = run.completions_of(split)
    # What a model writes may hold characters that the terminal's encoding lacks.
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
    collector = GroupCollector()
    for row in Tail(path).rows():
        steps.add(row["step"])
        groups.extend(_of_step(collector.add(row), step))
    groups.extend(_of_step(collector.rest(), step))
    if not groups:
        recorded = f"it has steps {min(steps)} to {max(steps)}" if steps else "it is empty so far"
        wanted = "no group" if step is None else f"no group of step {step}"
        raise ValueError(f"{path} holds {wanted}: {recorded}.")
    for group in groups:
        print_group(console, group)


def _follow(console: Console, run: RunDir, split: Split, step: int | None, limit: int) -> None:
    path = run.completions_of(split)
    tail = Tail(path)
    collector = GroupCollector()
    backlog: deque[list[Row]] = deque(maxlen=limit)
    for row in tail.rows():
        backlog.extend(_of_step(collector.add(row), step))
    for group in backlog:
        print_group(console, group)
    waiting_for_start = not _has_recorded(run)  # an attempt that failed at its start is no run
    if waiting_for_start or not path.exists():
        before = {"ended": "failed", "killed": "was killed"}.get(run.state() or "")
        earlier = f" (an earlier attempt {before} before its first step)" if before else ""
        print(f"waiting for {path}{earlier if waiting_for_start else ''}", file=sys.stderr)
    looked_for_reasons = False
    while True:
        # Asked before the file is read, so that the last groups are not missed.
        state = run.state()
        waiting_for_start = waiting_for_start and state != "running" and not _has_recorded(run)
        if not waiting_for_start and not looked_for_reasons:
            looked_for_reasons = True
            never = _why_never(run, split)
            if never is not None:
                raise ValueError(f"nothing to wait for: {never}")
        for row in tail.rows():
            for group in _of_step(collector.add(row), step):
                print_group(console, group)
        if state in ENDS and not waiting_for_start:
            print(ENDS[state], file=sys.stderr)
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _has_recorded(run: RunDir) -> bool:
    files = (run.metrics, run.completions, run.eval_completions)
    return any(path.exists() and path.stat().st_size for path in files)


def _why_missing(run: RunDir, split: Split) -> str:
    """Why a file of completions is not there."""
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
    """Which setting of the run keeps it from recording a kind of completions."""
    config = yaml.safe_load(run.config.read_text("utf-8")) if run.config.exists() else {}

    def setting(section: str, field: str) -> Any:
        return config.get(section, {}).get(field)

    if setting("tracking", "log_completions") is False:
        return "tracking.log_completions is off in this run"
    if split == "filtered" and setting("rollout", "dynamic_sample") is False:
        return "only rollout.dynamic_sample filters groups, and it is off in this run"
    if split == "eval" and config.get("eval_steps", 1) is None:
        return "eval_steps is not set in this run, so it evaluates nothing"
    return None


def _of_step(groups: Iterable[list[Row]], step: int | None) -> Iterator[list[Row]]:
    return (group for group in groups if step is None or group[0]["step"] == step)


class Tail:
    """The rows of a file that another process appends to, each once."""

    def __init__(self, path: Path):
        self._path = path
        self._position = 0
        self._inode: int | None = None

    def rows(self) -> Iterator[Row]:
        """Rows since the last call; none while the file does not exist.

        A resumed run cuts its file back to its checkpoint. What is left was there before, so
        reading goes on at the end of it.
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
                if row is None:
                    logger.warning("%s: skipped a line that is not a JSON object", self._path)
                else:
                    yield row


class GroupCollector:
    """Puts the rows of a group together; they follow each other in the file."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def add(self, row: Row) -> list[list[Row]]:
        """The groups that `row` completes: itself last of its group, or first of the next one."""
        groups = []
        if self._rows and _group_of(self._rows[0]) != _group_of(row):
            groups += self.rest()
        self._rows.append(row)
        if len(self._rows) == row["group_size"]:
            groups += self.rest()
        return groups

    def rest(self) -> list[list[Row]]:
        """The group at hand, of which rows are missing, if there is one."""
        rows, self._rows = self._rows, []
        return [rows] if rows else []


def _group_of(row: Row) -> tuple[int, int]:
    return row["step"], row["group_id"]


def print_group(console: Console, rows: list[Row]) -> None:
    """Print one group: a heading, the prompt once, the completions from best to worst."""
    first = rows[0]
    title = (
        f"step {first['step']}, group {first['group_id']}, prompt {printable(first['prompt_id'])}"
    )
    console.rule(Text(title, style="bold"), align="left", style="dim")
    console.print(Text(_group_summary(rows)))
    console.print()
    _print_indented(console, first["prompt"], "cyan")
    totals = [row["reward"] for row in rows if row["reward"] is not None]
    for row in sorted(rows, key=lambda row: -_worst_if_none(row["reward"])):
        style = ""
        if totals and min(totals) < max(totals):  # otherwise none is better than another
            style = {max(totals): "bold green", min(totals): "bold red"}.get(row["reward"], "")
        console.print()
        _print_heading(console, row, style)
        _print_indented(console, row["text"] or "(empty)", "" if row["text"] else "dim")
    console.print()


def _group_summary(rows: list[Row]) -> str:
    """Mean and standard deviation of the total, means of the reward functions."""
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
    starts = row["version_starts"][1:] if later else []
    versions = f"{first}" + "".join(
        f", {version} from token {start}" for version, start in zip(later, starts, strict=True)
    )
    line.append(f"  {counted(row['num_tokens'], 'token')}, {end}, policy {versions}", style="dim")
    console.print(line)


def _print_indented(console: Console, text: str, style: str) -> None:
    indent = "    "
    room = max(20, console.width - len(indent))
    for line in Text(printable(text), style=style).wrap(console, room):
        line.rstrip()
        console.print(Text(indent) + line, soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _worst_if_none(reward: float | None) -> float:
    return float("-inf") if reward is None else reward
