"""`rlsys logs RUN`: what the actors of a run and its driver print."""

from __future__ import annotations

import argparse
import heapq
import io
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from rlsys.commands.completions_follow import ENDS, SECONDS_BETWEEN_LOOKS
from rlsys.log_files import NAME, TIME_FORMAT, log_files
from rlsys.rotation import GrowingFile, open_parts
from rlsys.run.folder import RunDir
from rlsys.tracking.printable import printable

DEFAULT_LINES = 100
_TIME = len(time.strftime(TIME_FORMAT))
Files = Callable[[], Mapping[str, Path]]


def main(args: argparse.Namespace) -> None:
    """Show the logs of `args.run_dir`."""
    show_logs(args.run_dir, role=args.role, rank=args.rank, follow=args.follow, lines=args.lines)


def show_logs(
    run_dir: Path,
    *,
    role: str | None = None,
    rank: int | None = None,
    follow: bool = False,
    lines: int = DEFAULT_LINES,
) -> None:
    """Print the newest lines of all actors in the order of time, each with its actor's name.

    Args:
        run_dir: output directory of the run; with `follow` it need not exist yet.
        role, rank: only these actors.
        follow: print further lines as they come, until the run ends, is killed, or Ctrl-C.
        lines: how many at most.

    Raises:
        ValueError: there is nothing to show, or `lines` is negative.
    """
    if lines < 0:
        raise ValueError(f"--lines {lines} should be 0 or more")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    run = RunDir(run_dir)

    def files() -> dict[str, Path]:
        found = {name: NAME.fullmatch(name) for name in log_files(run.logs)}
        return {
            name: run.logs / f"{name}.log"
            for name, match in found.items()
            if match and role in (None, match["role"]) and rank in (None, int(match["rank"]))
        }

    try:
        if follow:
            _follow(run, files, lines)
        elif files():
            _print_newest(((name, _recorded(path)) for name, path in files().items()), lines)
        else:
            raise ValueError(_why_nothing(run))
    except KeyboardInterrupt:
        pass  # the way to stop following


def _follow(run: RunDir, files: Files, lines: int) -> None:
    readers: dict[str, GrowingFile] = {}
    is_first = True
    if not files():
        print(f"waiting for {run.logs}", file=sys.stderr)
    while True:
        state = run.state()  # read before the files, so that the last lines are not missed
        for name, path in files().items():
            readers.setdefault(name, GrowingFile(path))
        new = [(name, list(_texts(reader.new_lines()[1]))) for name, reader in readers.items()]
        _print_newest(new, lines if is_first else None)
        is_first = is_first and not readers
        if state in ENDS:
            print(ENDS[state], file=sys.stderr)
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _print_newest(logs: Iterable[tuple[str, Iterable[str]]], lines: int | None) -> None:
    """Print the last `lines` lines of all logs together; None is all of them."""
    kept = [(name, deque(texts, maxlen=lines)) for name, texts in logs]
    width = max((len(name) for name, _ in kept), default=0)
    named = [[(text, name) for text in texts] for name, texts in kept]
    merged = list(heapq.merge(*named, key=lambda line: line[0][:_TIME]))
    for text, name in islice(merged, 0 if lines is None else max(0, len(merged) - lines), None):
        print(f"{name:<{width}} {printable(text)}", flush=True)


def _recorded(path: Path) -> Iterator[str]:
    with ExitStack() as stack:
        for _, file in open_parts(path, stack):
            yield from _texts(file)


def _texts(lines: Iterable[bytes]) -> Iterator[str]:
    return (line.decode("utf-8", "replace").rstrip("\n") for line in lines)


def _why_nothing(run: RunDir) -> str:
    if not run.path.is_dir():
        return f"there is no folder {run.path}"
    if not run.config.exists():
        return f"{run.path} is not the output directory of a run"
    if names := list(log_files(run.logs)):
        return f"{run.logs} has logs of other actors: {', '.join(names)}"
    return (
        f"{run.logs} has no logs of actors: none has printed anything yet, or an older rlsys "
        "wrote this run"
    )
