"""Runs as DataFrames, for notebooks."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rlsys.records.completions import Query
from rlsys.records.run_record import RunRecord, RunStatus, open_run
from rlsys.tracking.base import Split

Library = Literal["pandas", "polars"]


class RunFrames:
    """What a run wrote, as DataFrames of pandas or polars.

    Args:
        record: the run.
        library: makes the DataFrames.
    """

    def __init__(self, record: RunRecord, library: Library):
        self._record = record
        self._library = importlib.import_module(library)

    @property
    def name(self) -> str:
        """`tracking.run_name`, or the name of the folder."""
        return self._record.name

    @property
    def config(self) -> dict[str, Any]:
        """The config as nested mappings."""
        return self._record.config

    @property
    def status(self) -> RunStatus:
        """How far the run is, how it ended, and its best evaluation."""
        return self._record.status

    @cached_property
    def metrics(self) -> Any:
        """A DataFrame with a row for each step: `step`, and a column for each metric.

        Metrics of an evaluation stand in the row of the step before it, with NaN in the others.
        """
        table = self._record.metrics()
        return self._library.DataFrame({"step": table.steps, **table.columns})

    @cached_property
    def completions(self) -> Any:
        """A DataFrame with a row for each completion that was trained on; see `search`."""
        return self.search()

    def search(self, where: str | None = None, split: Split = "train", **query: Any) -> Any:
        """A DataFrame of some completions.

        Args:
            where: a condition in SQL, such as "countdown = 0 and step >= 100".
            split: "train", "eval" for held-out ones, or "filtered".
            query: grep, steps, sort, descending, offset, limit or columns, as in
                `rlsys.records.Query`.

        Raises:
            ValueError: a wrong condition or an unknown column.
        """
        chosen = Query(where=where, **{"latest": True, **query})
        with self._record.completions(split).batches(chosen) as batches:
            table = batches.read_all()
        # polars has no mappings: `rewards` and `failures` become lists of keys and values there.
        is_polars = self._library.__name__ == "polars"
        return self._library.from_arrow(table) if is_polars else table.to_pandas()


def read_run(path: Path | str, *, library: Library | None = None) -> RunFrames:
    """Metrics and completions of a run as DataFrames.

    It may go on meanwhile: what is read is what was written by then.

    Example:
        run = rlsys.read_run("runs/countdown")
        run.metrics.plot(x="step", y="reward")
        run.search("countdown = 0 and format = 1", steps=(100, None))

    Args:
        path: output_dir of the run.
        library: "pandas" or "polars"; None is whichever is installed, pandas if both are.

    Raises:
        ValueError: the folder does not hold a run, or neither library is installed.
    """
    names: tuple[Library, ...] = ("pandas", "polars") if library is None else (library,)
    found = next((name for name in names if importlib.util.find_spec(name) is not None), None)
    if found is None:
        raise ValueError(f"read_run needs {' or '.join(names)}: pip install {names[0]}")
    return RunFrames(open_run(path), found)
