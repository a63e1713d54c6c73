"""Training rows that are read and rendered when they are needed, and never all in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from rlsys.config import DataConfig
from rlsys.data.readers import BadRow, RawRow
from rlsys.data.render import ChatTemplate
from rlsys.data.sources import Problems, Source, SourceCounts
from rlsys.types import Prompt, RolloutGroup

CHECKED_ROWS = 1000
"""Rows of each dataset that are checked before the run."""

_Place = tuple[Source, RawRow]


class StreamedPrompts:
    """An endless stream of prompts with the methods of `rlsys.data.streams.in_memory.PromptSource`.

    An epoch is one pass over all rows of its datasets, in their order, through a buffer of
    `shuffle_buffer_size` rows out of which one is drawn whenever the next is read. The order of
    rows depends on the seed alone. To continue from a state, the rows of the current epoch that
    were given already are read again, but neither parsed nor rendered.
    """

    def __init__(
        self,
        sources: list[Source],
        template: ChatTemplate,
        config: DataConfig,
        *,
        seed: int,
    ):
        self._sources = sources
        self._template = template
        self._config = config
        self._seed = seed
        self.counts = [
            SourceCounts(source.spec.text, source.preparation.name) for source in sources
        ]
        self.columns: dict[str, None] = {}
        """What every prompt has, None where its row has no such column."""
        self.first_prompts: list[Prompt] = []
        """Of the first rows of each dataset, under their place; they come again in the stream."""
        self.unsaveable: dict[str, str] = {}
        """Columns that JSON cannot hold, and what to do: a checkpoint holds streamed prompts that
        were begun and not trained on."""
        self.num_taken = 0
        self._epoch = 0
        self._num_given = 0  # rows of this epoch that left the buffer
        self._rows_an_epoch: int | None = None
        self._num_read_before = self._num_dropped_before = 0  # by the runs that this one continues
        self._rows = self._pass(0)

    @property
    def epoch(self) -> float:
        """Passes over the rows; the first one counts as 0 until it is over."""
        share = self._num_given / self._rows_an_epoch if self._rows_an_epoch else 0.0
        return self._epoch + share

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts.

        Raises:
            ValueError: a row that cannot be used, with its place; or no row of an epoch can.
        """
        prompts: list[Prompt] = []
        empty_since = self._epoch
        while len(prompts) < n:
            some = self._prompts(list(islice(self._endless(), n - len(prompts))))
            prompts += some
            if some:
                empty_since = self._epoch
            elif self._epoch > empty_since + 1:
                names = ", ".join(source.spec.text for source in self._sources)
                raise ValueError(
                    f"a whole pass over {names} gave no prompt: all rows are left out, by the "
                    "preprocessor or by data.max_prompt_length and min_prompt_length"
                )
        self.num_taken += n
        return prompts

    def observe(self, group: RolloutGroup) -> None:
        """Hear how a prompt was answered; this stream does not listen."""

    def metrics(self) -> dict[str, float]:
        """How many rows were read and not used, since the start of the run."""
        read = sum(count.rows for count in self.counts)
        used = sum(count.used for count in self.counts)
        return {
            "data/num_rows_read": float(self._num_read_before + read),
            "data/num_rows_dropped": float(self._num_dropped_before + read - used),
        }

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as JSON has it."""
        return {
            "num_taken": self.num_taken,
            "epoch": self._epoch,
            "num_given": self._num_given,
            "rows_an_epoch": self._rows_an_epoch,
            "metrics": self.metrics(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""
        self.num_taken = state["num_taken"]
        self._epoch = state["epoch"]
        self._num_given = state["num_given"]
        self._rows_an_epoch = state["rows_an_epoch"]
        self._num_read_before = int(state["metrics"]["data/num_rows_read"])
        self._num_dropped_before = int(state["metrics"]["data/num_rows_dropped"])
        self._rows = self._pass(self._epoch)
        skipped = sum(1 for _ in islice(self._rows, self._num_given))
        if skipped < self._num_given:
            raise ValueError(
                f"the checkpoint was {self._num_given:,} rows into the data, which now has "
                f"{skipped:,}: it is not what the run started with"
            )

    def check_first_rows(self, problems: Problems) -> None:
        """Look at the first rows of each dataset, for mistakes and for the names of columns.

        Rendering them lets the template notice what it leaves out of them.
        """
        for source in self._sources:
            parsed, bad = source.first_rows(CHECKED_ROWS)
            for _, row in parsed:
                self._note_columns(source, row.columns)
            for text in bad:
                problems.add(text)
            for (where, row), token_ids in zip(parsed, self._template.render(parsed), strict=True):
                if isinstance(token_ids, str):
                    problems.add(f"{where}: {token_ids}")
                    continue
                opens_think = self._template.opens_think(token_ids)
                self.first_prompts.append(
                    Prompt(where, row.messages, token_ids, row.columns, opens_think)
                )

    def _note_columns(self, source: Source, columns: dict[str, Any]) -> None:
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

    def _endless(self) -> Iterator[_Place]:
        while True:
            for place in self._rows:
                self._num_given += 1
                yield place
            self._rows_an_epoch = self._num_given
            self._epoch += 1
            self._num_given = 0
            self._rows = self._pass(self._epoch)

    def _pass(self, epoch: int) -> Iterator[_Place]:
        in_order = chain.from_iterable(
            ((source, raw) for raw in islice(source.raw_rows(), source.spec.num_rows))
            for source in self._sources
        )
        if not self._config.shuffle:
            return in_order
        drawing = random.Random(f"{self._seed}:{self._sources[0].prefix}:{epoch}")
        return _shuffled(in_order, self._config.shuffle_buffer_size, drawing)

    def _prompts(self, places: list[_Place]) -> list[Prompt]:
        """Those of the rows that are prompts within the limits."""
        counts = dict(zip(map(id, self._sources), self.counts, strict=True))
        understood = []
        for source, raw in places:
            counts[id(source)].rows += 1
            try:
                parsed = source.understand(raw)
            except BadRow as error:
                raise ValueError(_bad_row(f"{source.where(raw)}: {error}")) from error
            if parsed is None:
                counts[id(source)].filtered += 1
            else:
                understood.append((source, raw, parsed))
        rendered = self._template.render(
            [(source.where(raw), parsed) for source, raw, parsed in understood]
        )
        prompts = []
        for (source, raw, parsed), token_ids in zip(understood, rendered, strict=True):
            if isinstance(token_ids, str):
                raise ValueError(_bad_row(f"{source.where(raw)}: {token_ids}"))
            count = counts[id(source)]
            try:
                used = count.within_limits(len(token_ids), self._config)
            except BadRow as error:
                raise ValueError(_bad_row(f"{source.where(raw)}: {error}")) from error
            if used:
                count.used += 1
                columns = dict.fromkeys(self.columns) | parsed.columns
                opens_think = self._template.opens_think(token_ids)
                prompt_id = source.prompt_id(raw)
                prompts.append(Prompt(prompt_id, parsed.messages, token_ids, columns, opens_think))
        return prompts


def _bad_row(text: str) -> str:
    return (
        f"{text}\nWith data.streaming rows are checked when they are needed. To check all before a "
        "run: rlsys data preview CONFIG --data.streaming false"
    )


def _shuffled(rows: Iterator[_Place], size: int, drawing: random.Random) -> Iterator[_Place]:
    buffer = list(islice(rows, size))
    for row in rows:
        index = drawing.randrange(size)
        yield buffer[index]
        buffer[index] = row
    drawing.shuffle(buffer)
    yield from buffer
