"""Waiting for completions, and why a run has none."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsys.commands.completions_print import Row, best_first, print_group
from rlsys.config.yaml_text import read_yaml
from rlsys.files import decode_row
from rlsys.rotation import GrowingFile
from rlsys.run.folder import RunDir, State
from rlsys.tracking.base import Split
from rlsys.tracking.completions import row_problem

SECONDS_BETWEEN_LOOKS = 0.25
LAST_BYTES = 32 << 20
"""What is read of completions that are there already: more than the newest few groups."""
ENDS: dict[State | None, str] = {
    "ended": "the run has ended",
    "killed": "the run was killed: its status is running, and no process is in its folder",
}
"""States of a run that end `follow`, in words."""

logger = logging.getLogger(__name__)
Steps = tuple[int | None, int | None]
"""First and last step; None is open."""


def follow(console: Console, run: RunDir, split: Split, steps: Steps, limit: int) -> None:
    """Print the newest `limit` groups, and then those that come, until the run ends.

    Raises:
        ValueError: the run never writes such completions.
    """
    path = run.completions_of(split)
    reader = GroupReader(path, last_bytes=LAST_BYTES)

    def new_groups() -> Iterator[list[Row]]:
        return (group for group in reader.groups() if _is_within(group[0]["step"], steps))

    for group in deque(new_groups(), maxlen=limit):
        print_group(console, best_first(group))
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
            print_group(console, best_first(group))
        if has_started and state in ENDS:
            print(ENDS[state], file=sys.stderr)
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _is_within(step: int, steps: Steps) -> bool:
    first, last = steps
    return (first is None or step >= first) and (last is None or step <= last)


def why_missing(run: RunDir, split: Split) -> str:
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


def _has_recorded(run: RunDir) -> bool:
    files = (run.metrics, run.completions, run.eval_completions)
    return any(path.exists() and path.stat().st_size for path in files)


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

    if method := next((name for name in ("sft", "preference") if name in config), None):
        return (
            f"it is a run of `rlsys {method}`, which samples nothing. `rlsys infer RUN` asks its "
            "model, and `rlsys data preview CONFIG` shows what it was trained on"
        )
    if setting("tracking", "log_completions") is False:
        return "tracking.log_completions is off in this run"
    if split == "filtered" and setting("rollout", "dynamic_sample") is False:
        return "only rollout.dynamic_sample filters groups, and it is off in this run"
    if split == "eval" and config.get("eval_steps", 1) is None:
        return "eval_steps is not set in this run, so it evaluates nothing"
    return None


class Tail:
    """The rows of a file that another process appends to, and of its older parts, each once.

    Args:
        path: the newest part.
        last_bytes: what of the rows that are there already is read; None is all.
    """

    def __init__(self, path: Path, last_bytes: int | None = None):
        self._path = path
        self._file = GrowingFile(path, last_bytes)

    def rows(self) -> Iterator[Row]:
        """Rows since the last call; none while the file does not exist.

        A resumed run cuts its files back to its checkpoint. The rows that are left are not new, so
        reading continues at the end.
        """
        restarted, lines = self._file.new_lines()
        for line in lines:
            if restarted:
                continue
            row = decode_row(line)
            problem = "it is not a JSON object" if row is None else row_problem(row)
            if row is None or problem is not None:
                logger.warning("%s: skipped a line: %s", self._path, problem)
            else:
                yield row


class GroupReader:
    """The groups of a file that another process appends to; rows of a group stand together."""

    def __init__(self, path: Path, last_bytes: int | None = None):
        self._tail = Tail(path, last_bytes)
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
