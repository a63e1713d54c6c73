"""Training rows that are read and rendered when they are needed, and never all in memory."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from rlsys.config import RowsConfig
from rlsys.data.render import Renderer
from rlsys.data.row import Row
from rlsys.data.sources import Source, render_rows
from rlsys.data.streams.base import Stream, T
from rlsys.problems import Problem

CHECKED_ROWS = 1000
"""Rows of each dataset that are checked before the run."""


class Streamed(Stream[T]):
    """A stream of rows from files.

    An epoch is one pass over all rows of its datasets, in their order, through a buffer of
    `shuffle_buffer_size` rows out of which one is drawn whenever the next is read. The order of
    rows depends on the seed alone. A stream that loads a state reads the rows of the epoch that
    were given before, but neither parses nor renders them.
    """

    def __init__(
        self, sources: list[Source[T]], renderer: Renderer, config: RowsConfig, *, seed: int
    ):
        self._sources = sources
        self._renderer = renderer
        self._config = config
        self._seed = seed
        self.counts = [source.counts for source in sources]
        self.columns: dict[str, None] = {}
        """Columns of every prompt, None where its row does not have one."""
        self.first: list[T] = []
        """What the first rows become; the stream gives these rows too."""
        self.unsaveable: dict[str, str] = {}
        """Columns that JSON cannot hold, and what to do: a checkpoint holds the streamed prompts
        that were begun and not trained on."""
        self._epoch = 0
        self._num_given = 0  # rows of this epoch that left the buffer
        self._left: list[T] = []  # of the last row given, if it became more than one
        self._rows_an_epoch: int | None = None
        self._num_read_before = self._num_dropped_before = 0  # by the runs that this one continues
        self._rows = self._pass(0)

    @property
    def epoch(self) -> float:
        """Passes over the rows; the first one counts as 0 until it is over."""
        share = self._num_given / self._rows_an_epoch if self._rows_an_epoch else 0.0
        return self._epoch + share

    def take(self, n: int) -> list[T]:
        """The next `n` prompts or samples.

        Raises:
            ValueError: a row that cannot be used, with its location; or no row of an epoch can.
        """
        taken, self._left = self._left[:n], self._left[n:]
        empty_since = self._epoch
        while len(taken) < n:
            wanted = n - len(taken)
            some = self._make(list(islice(self._endless(), 1 if self._cuts_rows else wanted)))
            taken, self._left = [*taken, *some[:wanted]], some[wanted:]
            if some:
                empty_since = self._epoch
            elif self._epoch > empty_since + 1:
                names = ", ".join(source.spec.text for source in self._sources)
                raise ValueError(
                    f"a whole pass over {names} gave nothing to train on: all rows are left "
                    f"out, by the preprocessor or by {self._sources[0].limits}"
                )
        self.num_taken += n
        return taken

    def metrics(self) -> dict[str, float]:
        """Rows read, and rows not used, since the start of the run."""
        read = sum(count.rows for count in self.counts)
        dropped = sum(count.dropped.total() for count in self.counts)
        return {
            "data/num_rows_read": float(self._num_read_before + read),
            "data/num_rows_dropped": float(self._num_dropped_before + dropped),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position in the rows and the metrics, in JSON's types."""
        return super().state_dict() | {
            "epoch": self._epoch,
            "num_given": self._num_given,
            "rows_an_epoch": self._rows_an_epoch,
            "num_left": len(self._left),
            "metrics": self.metrics(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was.

        Raises:
            ValueError: the data has fewer rows than the stream with this state gave.
        """
        super().load_state_dict(state)
        self._epoch = state["epoch"]
        self._num_given = state["num_given"]
        self._rows_an_epoch = state["rows_an_epoch"]
        self._num_read_before = int(state["metrics"]["data/num_rows_read"])
        self._num_dropped_before = int(state["metrics"]["data/num_rows_dropped"])
        self._rows = self._pass(self._epoch)
        last: deque[tuple[int, tuple[Source[T], Row]]]
        last = deque(enumerate(islice(self._rows, self._num_given), start=1), maxlen=1)
        skipped = last[0][0] if last else 0
        if skipped < self._num_given:
            raise ValueError(
                f"the checkpoint was {self._num_given:,} rows into the data, which now has "
                f"{skipped:,}: it is not what the run started with"
            )
        num_left = state.get("num_left", 0)  # older checkpoints have none
        if num_left:
            [(_, pair)] = last
            render_rows([pair], self._renderer)
            self._left = self._of_row(*pair)[-num_left:]

    def check_first_rows(self) -> list[Problem]:
        """Read the first rows of each dataset, for their problems and the names of columns.

        Rendering them lets the template notice what it leaves out.
        """
        problems: list[Problem] = []
        for source in self._sources:
            rows, found = source.first_rows(CHECKED_ROWS)
            problems += found
            self._renderer.render(rows)
            for row in rows:
                self._note_columns(source, row.columns)
                if row.is_usable:
                    source.limit(row)
                if row.is_usable:
                    self.first += source.make(row, 0, list(row.columns))
            problems += source.row_problems(rows)
        return problems

    def _note_columns(self, source: Source[T], columns: dict[str, Any]) -> None:
        self.columns.update(dict.fromkeys(columns))
        for name, value in columns.items():
            try:
                json.dumps(value)
            except TypeError as error:
                self.unsaveable[name] = (
                    f"dataset {source.spec.text!r}: checkpoints cannot hold the column {name!r} of "
                    f"streamed rows ({error}; it is of type {type(value).__name__}). Turn it into "
                    "text or leave it out with a data.preprocessor, or do not set data.streaming"
                )

    def _endless(self) -> Iterator[tuple[Source[T], Row]]:
        while True:
            for pair in self._rows:
                self._num_given += 1
                yield pair
            self._rows_an_epoch = self._num_given
            self._epoch += 1
            self._num_given = 0
            self._rows = self._pass(self._epoch)

    def _pass(self, epoch: int) -> Iterator[tuple[Source[T], Row]]:
        in_order = (
            (source, row)
            for source in self._sources
            for row in islice(source.rows(), source.spec.num_rows)
        )
        if not self._config.shuffle:
            return in_order
        drawing = random.Random(f"{self._seed}:{self._sources[0].prefix}:{epoch}")
        return _shuffled(in_order, self._config.shuffle_buffer_size, drawing)

    def _make(self, rows: list[tuple[Source[T], Row]]) -> list[T]:
        """What becomes of the rows that are not dropped."""
        render_rows(rows, self._renderer)
        for source, row in rows:
            if row.problem:
                raise ValueError(
                    f"{row.location}: {row.problem}\nWith data.streaming rows are checked when "
                    "they are needed. To check all before a run: rlsys data preview CONFIG "
                    "--data.streaming false"
                )
            source.counts.add(row)
        return [one for source, row in rows if not row.dropped for one in self._of_row(source, row)]

    def _of_row(self, source: Source[T], row: Row) -> list[T]:
        """What a rendered row becomes, also with columns that no row had so far."""
        return source.make(row, 0, [*(self.columns | row.columns)])

    @property
    def _cuts_rows(self) -> bool:
        """Whether a row may become several."""
        return any(source.cuts_rows for source in self._sources)


def open_streams(
    sources: list[Source[T]],
    config: RowsConfig,
    renderer: Renderer,
    problems: list[Problem],
    *,
    seed: int,
) -> list[Streamed[T]]:
    """One stream for all datasets, or one for each if they have weights; first rows checked."""
    parts = [[source] for source in sources] if config.dataset_weights else [sources]
    streams = [Streamed(part, renderer, config, seed=seed) for part in parts if part]
    for stream in streams:
        problems += stream.check_first_rows()
    # One set of columns for all, so that a reward misses no argument.
    columns = {name: None for stream in streams for name in stream.columns}
    for stream in streams:
        stream.columns = columns
    return streams


def _shuffled(
    rows: Iterator[tuple[Source[T], Row]], size: int, drawing: random.Random
) -> Iterator[tuple[Source[T], Row]]:
    buffer = list(islice(rows, size))
    for row in rows:
        index = drawing.randrange(size)
        yield buffer[index]
        buffer[index] = row
    drawing.shuffle(buffer)
    yield from buffer
