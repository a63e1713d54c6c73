"""From the datasets of a config to what a run trains on, all in memory."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np

from rlsys.config import DataConfig, RowsConfig
from rlsys.data.counts import SourceCounts
from rlsys.data.render import Renderer
from rlsys.data.row import DUPLICATE, Row
from rlsys.data.sources import (
    PromptSource,
    Source,
    SourceKind,
    check_renamed,
    open_set,
    open_sources,
    raise_if_any,
    render_rows,
)
from rlsys.data.streams.base import T
from rlsys.data.streams.streamed import Streamed, open_streams
from rlsys.plugins.load import plugin_problems
from rlsys.problems import Problem
from rlsys.text import counted
from rlsys.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_BATCH = 1000
"""Rows tokenised together: enough to keep the tokenizer busy."""
RowCheck = Callable[[Mapping[str, Any]], list[str]]
"""Maps the columns of one row to what is wrong with them."""
L = TypeVar("L", bound="Loaded[Any]")


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """What a run trains on and is evaluated with."""

    noun: ClassVar[str] = "row"
    """What messages call one of them."""

    train: list[T]
    """In the order of the datasets and their rows; empty with data.streaming."""
    validation: list[T]
    """Held out, at most data.max_eval_prompts or max_eval_samples; without data.val_sets."""
    train_sizes: list[int]
    """The number in `train` from each entry of data.dataset, in order."""
    counts: list[SourceCounts] = field(default_factory=list)
    """How many rows of each dataset are used or dropped, training data first."""
    streams: list[Streamed[T]] = field(default_factory=list)
    """With data.streaming, one stream for all datasets, or one for each if they have weights."""

    refused: list[Problem] = field(default_factory=list)
    """Rows in which `check` found something wrong."""
    notices: list[str] = field(default_factory=list)
    """Parts of rows that the chat template leaves out, and missing values in prompts."""
    val_sets: dict[str, list[T]] = field(default_factory=dict)
    """Further held-out ones by the name in data.val_sets, as many of each as in `validation`."""

    @property
    def held_out_sets(self) -> dict[str, list[T]]:
        """All that is held out by the name of its set; `validation`, if any, is ""."""
        return ({"": self.validation} if self.validation else {}) | self.val_sets

    @property
    def held_out(self) -> list[T]:
        """All that is held out."""
        return [row for rows in self.held_out_sets.values() for row in rows]

    @property
    def some(self) -> list[T]:
        """What is trained on; of streamed data the first rows."""
        return self.train or [row for stream in self.streams for row in stream.first]

    @property
    def num_validation_in_train(self) -> int:
        """Held-out ones that are trained on as well."""
        known = texts_of(self.train)
        return sum(text_of(row) in known for row in self.held_out)

    def summary(self) -> list[str]:
        """Lines that account for every row, and name what was left out."""
        if self.streams:
            names = [count.source for stream in self.streams for count in stream.counts]
            streamed = f"data: {', '.join(names)}: streamed, rows are checked as they come"
            lines = [streamed, *(f"data: {count}" for count in self.counts[len(names) :])]
        else:
            lines = [f"data: {count}" for count in self.counts]
        if self.num_validation_in_train:
            lines.append(
                f"data: {self.num_validation_in_train:,} of {len(self.held_out):,} held-out "
                f"{self.noun}s are in the training data too, so eval/ looks better than it should"
            )
        return lines + [f"data: {notice}" for notice in self.notices]


@dataclass(frozen=True, slots=True)
class PromptData(Loaded[Prompt]):
    """The prompts of a run."""

    noun: ClassVar[str] = "prompt"

    @property
    def columns(self) -> list[str]:
        """The columns that every training prompt carries to the rewards."""
        return list(self.streams[0].columns if self.streams else self.train[0].columns)

    @property
    def unsaveable(self) -> list[str]:
        """Columns of streamed rows that no checkpoint can hold, and what to do."""
        return [text for stream in self.streams for text in stream.unsaveable.values()]


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    check: RowCheck | None = None,
) -> PromptData:
    """Read the datasets, render the chat template once, filter, split.

    `prompt_id` is the name of the file (or of the hub's dataset) and the row counted from 1, as
    in "train:17"; the second copy of a row that `#ROWS` repeats is "train:17+1".

    Args:
        config: the datasets and what to do with their rows.
        tokenizer: of the model, with its chat template.
        seed: of everything that is drawn.
        check: called with the columns of every row that is used, except streamed ones.

    Raises:
        ValueError: all problems, up to a number: of datasets, rows, chat template; no prompt left.
    """
    renderer = Renderer(tokenizer, config.chat_template_kwargs)
    limit = config.max_eval_prompts
    return load(PromptData, PromptSource, config, renderer, seed=seed, limit=limit, check=check)


def load(
    into: type[L],
    kind: SourceKind[T],
    config: RowsConfig,
    renderer: Renderer,
    *,
    seed: int,
    limit: int | None,
    check: RowCheck | None = None,
) -> L:
    """Read the datasets as sources of a kind into a class; see `load_prompts` for the rest.

    Args:
        into: the class to return.
        kind: makes a source of each dataset.
        config: the datasets and what to do with their rows.
        renderer: sets the token ids of rows.
        seed: of everything that is drawn.
        limit: rows to evaluate on in each set, at most; None takes all.
        check: as for `load_prompts`.
    """
    problems = list(plugin_problems("data.external_plugins", config.external_plugins))
    sources = open_sources(kind, config, "train", problems)
    val_sources = open_sources(kind, config, "validation", problems)
    set_sources = {name: open_set(kind, config, name, problems) for name in config.val_sets}
    refused: list[Problem] = []

    def made_of(some: list[Source[T]]) -> list[list[T]]:
        taken = _load_rows(some, config, renderer, problems, seed=seed)
        return _by_source(some, taken, _make(taken, check, refused))

    streams, of_sources = list[Streamed[T]](), list[list[T]]()
    if config.streaming:
        streams = open_streams(sources, config, renderer, problems, seed=seed)
    else:
        of_sources = made_of(sources)
    validation = [row for rows in made_of(val_sources) for row in rows]
    val_sets = {
        name: [row for rows in made_of(own) for row in rows] for name, own in set_sources.items()
    }
    evaluated = [*val_sources, *(source for own in set_sources.values() for source in own)]
    check_renamed(config, [*sources, *evaluated], problems)
    if problems:
        raise_if_any([*problems, *refused])
    for some in ([] if config.streaming else sources, val_sources, *set_sources.values()):
        _check_something_left(config, some)
    train, sizes = [row for rows in of_sources for row in rows], list(map(len, of_sources))
    _check_is_held_out(config, train, validation, into.noun)
    if not config.val_dataset:
        train, validation, sizes = _split(config, train, sizes, seed=seed, noun=into.noun)
    return into(
        train,
        validation[:limit],
        sizes,
        [source.counts for source in (*sources, *evaluated)],
        streams,
        refused,
        renderer.notices,
        {name: rows[:limit] for name, rows in val_sets.items()},
    )


# --- stages --------------------------------------------------------------------------------------

_Taken = tuple[Source[T], Row, int]
"""A row that is used, and the number of its copy: 0 for the row itself, from 1 for repetitions."""


def _load_rows(
    sources: list[Source[T]],
    config: RowsConfig,
    renderer: Renderer,
    problems: list[Problem],
    *,
    seed: int,
) -> list[_Taken[T]]:
    """The rows to use of each dataset, rendered."""
    taken: list[_Taken[T]] = []
    seen: set[bytes] = set()
    for source in sources:
        try:
            sample = _sample(list(source.rows()), source, seed=seed)
        except ValueError as error:
            problems.append(Problem(str(error)))
            continue
        rows = list({row.number: row for row, _ in sample}.values())
        for start in range(0, len(rows), RENDER_BATCH):
            render_rows([(source, row) for row in rows[start : start + RENDER_BATCH]], renderer)
        if config.deduplicate and source.split == "train":
            _drop_duplicates(rows, seen)
        problems += source.problems(rows)
        for row, copy in sample:
            source.counts.add(row)
            if row.is_usable:
                taken.append((source, row, copy))
    return taken


def _sample(rows: list[Row], source: Source[T], *, seed: int) -> list[tuple[Row, int]]:
    """The rows that `#ROWS` takes, each with the number of its copy; without it all.

    This is ms-swift's rule: fewer rows than the dataset has are drawn without replacement; more
    are the whole dataset as often as it fits, and the rest drawn. Without shuffling, and for
    evaluation, the first rows are taken instead; evaluation data cannot be repeated.
    """
    wanted = source.spec.num_rows
    if wanted is None or not rows:
        return [(row, 0) for row in rows]
    if source.split == "validation" and wanted > len(rows):
        raise ValueError(
            f"dataset {source.spec.text!r} has {len(rows):,} rows, and evaluation does "
            f"not repeat rows: ask for at most {len(rows):,}"
        )
    copies, rest = divmod(wanted, len(rows))
    some = list(range(rest))
    if source.config.shuffle and source.split == "train":
        drawing = random.Random(f"{seed}:sample:{source.prefix}")
        some = sorted(drawing.sample(range(len(rows)), rest))
    whole = [(row, copy) for copy in range(copies) for row in rows]
    return whole + [(rows[index], copies) for index in some]


def _drop_duplicates(rows: list[Row], seen: set[bytes]) -> None:
    """Drop rows with the text of an earlier row."""
    for row in rows:
        text = text_of(row)
        if row.is_usable and text in seen:
            row.dropped = DUPLICATE
        elif row.is_usable:
            seen.add(text)


def _make(taken: list[_Taken[T]], check: RowCheck | None, refused: list[Problem]) -> list[list[T]]:
    """What each row becomes. All get the same columns, so that a reward misses no argument."""
    names = list(dict.fromkeys(name for _, row, _ in taken for name in row.columns))
    made = [source.make(row, copy, names) for source, row, copy in taken]
    if check is not None:
        asked = [
            (row.location, {name: row.columns.get(name) for name in names})
            for _, row, copy in taken
            if not copy
        ]
        found = [(location, text) for location, columns in asked for text in check(columns)]
        if len(asked) == len(found) > 1 and len({text for _, text in found}) == 1:
            found = [("every row", found[0][1])]
        refused += [Problem(f"{location}: {text}") for location, text in found]
    return made


def _by_source(
    sources: list[Source[T]], taken: list[_Taken[T]], made: list[list[T]]
) -> list[list[T]]:
    """What the rows became, together for each source."""
    found: dict[int, list[T]] = {id(source): [] for source in sources}
    for (source, *_), rows in zip(taken, made, strict=True):
        found[id(source)] += rows
    return list(found.values())


def _check_something_left(config: RowsConfig, sources: Sequence[Source[T]]) -> None:
    """Refuse data of which nothing is left, and a dataset with a weight and nothing left."""
    empty = [source for source in sources if not source.counts.used]
    if not empty or (len(empty) < len(sources) and not config.dataset_weights):
        return
    some = sources if len(empty) == len(sources) else empty[:1]
    lengths = [length for source in some for length in source.counts.lengths.elements()]
    names = ", ".join(source.counts.source for source in some)
    if not lengths:
        reasons = [f"{n:,} {why}" for s in some for why, n in s.counts.dropped.items()]
        raise ValueError(f"no row of {names} is left: {', '.join(reasons)}.")
    raise ValueError(some[0].nothing_left(names, lengths))


def _check_is_held_out(
    config: RowsConfig, train: Sequence[T], validation: Sequence[T], noun: str
) -> None:
    if config.val_dataset and texts_of(validation) <= texts_of(train):
        raise ValueError(
            f"every {noun} of data.val_dataset ({', '.join(config.val_dataset)}) is in the "
            "training data too. Leave val_dataset empty and set split_dataset_ratio."
        )


def _split(
    config: RowsConfig, rows: list[T], sizes: list[int], *, seed: int, noun: str
) -> tuple[list[T], list[T], list[int]]:
    """Training and held-out rows by data.split_dataset_ratio, and the sizes that are left."""
    train, validation = split_rows(rows, config.split_dataset_ratio, seed=seed, noun=noun)
    kept = {id(row) for row in train}
    remaining = iter(rows)
    sizes = [sum(id(row) in kept for row in islice(remaining, size)) for size in sizes]
    if config.dataset_weights and 0 in sizes and train:
        raise ValueError(
            f"data.split_dataset_ratio = {config.split_dataset_ratio} holds out every {noun} "
            f"of {config.dataset[sizes.index(0)]}, which has a weight in data.dataset_weights. "
            "Give it more rows, or use val_dataset."
        )
    return train, validation, sizes


def split_rows(
    rows: list[T], ratio: float, *, seed: int, noun: str = "row"
) -> tuple[list[T], list[T]]:
    """Split into training and validation, each in the given order; `ratio` goes to validation.

    Rows with the same text stay together, so nothing is both trained and evaluated on.

    Raises:
        ValueError: one of the two would be empty.
    """
    if ratio == 0.0:
        return rows, []
    wanted = max(1, round(ratio * len(rows)))
    texts = Counter(map(text_of, rows))
    order = list(texts)
    random.Random(seed).shuffle(order)
    held_out: set[bytes] = set()
    num_held_out = 0
    while num_held_out < wanted and order:
        text = order.pop()
        held_out.add(text)
        num_held_out += texts[text]
    if not order:
        raise ValueError(
            f"data.split_dataset_ratio = {ratio} leaves nothing to train on: "
            f"{counted(len(rows), 'row')} with {counted(len(texts), f'different {noun}')}. Give "
            "more rows or a val_dataset."
        )
    return (
        [row for row in rows if text_of(row) not in held_out],
        [row for row in rows if text_of(row) in held_out],
    )


def split_prompts(
    prompts: list[Prompt], ratio: float, *, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """`split_rows` of prompts."""
    return split_rows(prompts, ratio, seed=seed, noun="prompt")


def text_of(row: T | Row) -> bytes:
    """The token ids of a row, equal for rows with the same text."""
    ids = row.all_token_ids if isinstance(row, Row) else row.token_ids
    return np.asarray(ids, dtype=np.int32).tobytes()


def texts_of(rows: Sequence[T]) -> set[bytes]:
    """The different texts."""
    return set(map(text_of, rows))
