"""`rlsys runs PARENT`: the runs in a folder, with what they are doing and how far they are."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from rich.console import Console

from rlsys.records import RunRecord, RunStatus, find_runs
from rlsys.records.run_record import holds_records
from rlsys.tracking.columns import print_lines
from rlsys.tracking.composite import format_seconds
from rlsys.tracking.printable import printable

HEADINGS = ("run", "method", "status", "step", "best held-out", "time", "updated")


def main(args: argparse.Namespace) -> None:
    """List the runs in `args.parents`, the newest last.

    Raises:
        ValueError: a folder that does not exist or holds no runs.
    """
    records = [record for parent in args.parents for record in _records(parent)]
    found = [(record, record.status) for record in records]
    found.sort(key=lambda pair: pair[1].updated or 0.0)
    if args.format == "json":
        for record, status in found:
            print(json.dumps({"path": str(record.path), "name": record.name, **asdict(status)}))
        return
    rows = [HEADINGS, *(_cells(record, status) for record, status in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    console = Console(markup=False, highlight=False, emoji=False)
    print_lines(
        console,
        ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows],
    )


def _records(parent: Path) -> list[RunRecord]:
    if holds_records(parent):
        return [RunRecord(parent)]
    if not parent.is_dir():
        raise ValueError(f"{parent} is not a folder")
    if not (paths := find_runs(parent)):
        raise ValueError(f"{parent} holds no runs: name the folder that holds their output_dirs")
    return [RunRecord(path) for path in paths]


def _cells(record: RunRecord, status: RunStatus) -> tuple[str, ...]:
    state: str = status.state or "-"
    if status.exit_code:
        state = f"{state}, exit code {status.exit_code}"
    best = status.best_eval
    updated = status.updated
    return (
        printable(str(record.path)),
        status.method or "-",
        state,
        f"{status.step}/{status.steps or '?'}",
        "-" if best is None else f"{best.metric} {best.value:.4g} at {best.step}",
        format_seconds(status.seconds),
        "-" if updated is None else f"{datetime.fromtimestamp(updated):%Y-%m-%d %H:%M}",
    )
