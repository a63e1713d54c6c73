"""The runs that the page shows: looked for again, because runs start and are deleted meanwhile."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlsys.records import RunRecord, find_runs, open_run
from rlsys.records.run_record import holds_records

LOOK_EVERY_S = 2.0


class UnknownRun(LookupError):
    """A run that the page does not show; the text is for people."""


class Runs:
    """The runs below some folders, by an id that stays the same when the page is started again.

    Threads may use it at the same time.

    Args:
        places: folders of runs, or folders with runs in them.
        clock: seconds.
    """

    def __init__(self, places: Sequence[Path], clock: Callable[[], float] = time.monotonic):
        self._places = [place.expanduser().absolute() for place in places]
        self._clock = clock
        self._looked: float | None = None
        self._records: dict[str, RunRecord] = {}
        self._names: dict[str, str] = {}
        self._lock = threading.Lock()

    def check(self) -> int:
        """The number of runs.

        Raises:
            ValueError: a place is not a run and holds none.
        """
        for place in self._places:
            if not _runs_of(place):
                open_run(place)  # raises what is wrong with it
        return len(self.all())

    def all(self) -> dict[str, RunRecord]:
        """Id -> run, in the order of the places."""
        with self._lock:
            now = self._clock()
            if self._looked is None or now - self._looked >= LOOK_EVERY_S:
                self._look()
                self._looked = now
            return dict(self._records)

    def name(self, run: str) -> str:
        """What people call a run: its folder, with the parents that tell it from others."""
        with self._lock:
            return self._names.get(run, run)

    def get(self, run: str) -> RunRecord:
        """One run.

        Raises:
            UnknownRun: it is not shown, or its folder is gone.
        """
        runs = self.all()
        if run not in runs:
            raise UnknownRun(f"no run {run!r} is here: it was deleted, or was never shown")
        return runs[run]

    def _look(self) -> None:
        # A folder that was named twice, or by a link, is one run.
        paths = {path.resolve(): path for place in self._places for path in _runs_of(place)}
        ids = {_id(resolved): path for resolved, path in paths.items()}
        self._records = {
            name: self._records.get(name) or RunRecord(path) for name, path in ids.items()
        }
        self._names = dict(zip(ids, _shortest_names(list(ids.values())), strict=True))


def _runs_of(place: Path) -> list[Path]:
    return [place] if holds_records(place) else find_runs(place)


def _id(path: Path) -> str:
    """An id for addresses: the folder's name and a part of its path's hash."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name)
    return f"{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _shortest_names(paths: list[Path]) -> list[str]:
    """The ends of paths, as long as they need to be to differ."""
    names = []
    for path in paths:
        others = [other.parts for other in paths if other != path]
        length = 1
        while length < len(path.parts) and any(
            other[-length:] == path.parts[-length:] for other in others
        ):
            length += 1
        names.append("/".join(path.parts[-length:]))
    return names
