"""From the datasets of a config to prompts ready to sample from, all in memory."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlsys.config import DataConfig
from rlsys.data.render import Renderer
from rlsys.data.row import DUPLICATE, Row
from rlsys.data.sources import (
    Source,
    SourceCounts,
    check_renamed,
    open_set,
    open_sources,
    raise_if_any,
    render_rows,
)
from rlsys.data.streams.streamed import StreamedPrompts, open_streams
from rlsys.plugins.load import plugin_problems
from rlsys.problems import Problem
from rlsys.text import counted
from rlsys.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_BATCH = 1000
"""Prompts tokenised together: enough to keep the tokenizer busy."""
RowCheck = Callable[[Mapping[str, Any]], list[str]]
"""Maps the columns of one row to what is wrong with them."""


@dataclass(frozen=True, slots=True)
class PromptData:
    """The prompts of a run."""

    train: list[Prompt]
    """In the order of the datasets and their rows; empty with data.streaming."""
    validation: list[Prompt]
    """Held out, at most max_eval_prompts; without the sets of data.val_sets."""
    train_sizes: list[int]
    """The number of prompts in `train` from each entry of data.dataset, in order."""
    counts: list[SourceCounts] = field(default_factory=list)
    """How many rows of each dataset are used or dropped, training data first."""
    streams: list[StreamedPrompts] = field(default_factory=list)
    """With data.streaming, one stream for all datasets, or one for each if they have weights."""

    refused: list[Problem] = field(default_factory=list)
    """Rows in which `check` found something wrong."""
    notices: list[str] = field(default_factory=list)
    """Parts of rows that the chat template leaves out, and missing values in prompts."""
    val_sets: dict[str, list[Prompt]] = field(default_factory=dict)
    """Further held-out prompts by the name in data.val_sets, at most max_eval_prompts each."""

    @property
    def held_out_sets(self) -> dict[str, list[Prompt]]:
        """All held-out prompts by the name of their set; `validation`, if any, is ""."""
        return ({"": self.validation} if self.validation else {}) | self.val_sets

    @property
    def held_out(self) -> list[Prompt]:
        """All held-out prompts."""
        return [prompt for prompts in self.held_out_sets.values() for prompt in prompts]

    @property
    def num_validation_in_train(self) -> int:
        """Held-out prompts that are trained on as well."""
        known = texts_of(self.train)
        return sum(tuple(prompt.token_ids) in known for prompt in self.held_out)

    @property
    def columns(self) -> list[str]:
        """The columns that every training prompt carries to the rewards."""
        return list(self.streams[0].columns if self.streams else self.train[0].columns)

    @property
    def unsaveable(self) -> list[str]:
        """Columns of streamed rows that no checkpoint can hold, and what to do."""
        return [text for stream in self.streams for text in stream.unsaveable.values()]

    def summary(self) -> list[str]:
        """Lines that account for every row, and name what prompts lack."""
        if self.streams:
            names = [count.source for stream in self.streams for count in stream.counts]
            streamed = f"data: {', '.join(names)}: streamed, rows are checked as they come"
            lines = [streamed, *(f"data: {count}" for count in self.counts[len(names) :])]
        else:
            lines = [f"data: {count}" for count in self.counts]
        if self.num_validation_in_train:
            lines.append(
                f"data: {self.num_validation_in_train:,} of {len(self.held_out):,} held-out "
                "prompts are in the training data too, so eval/ looks better than it should"
            )
        return lines + [f"data: {notice}" for notice in self.notices]


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
    problems = list(plugin_problems("data.external_plugins", config.external_plugins))
    sources = open_sources(config, "train", problems)
    val_sources = open_sources(config, "validation", problems)
    set_sources = {name: open_set(config, name, problems) for name in config.val_sets}
    refused: list[Problem] = []

    def prompts_of(some: list[Source]) -> list[Prompt]:
        rows = _load_rows(some, config, renderer, problems, seed=seed)
        return _make_prompts(rows, check, refused)

    streams: list[StreamedPrompts] = []
    train: list[Prompt] = []
    if config.streaming:
        streams = open_streams(sources, config, renderer, problems, seed=seed)
    else:
        train = prompts_of(sources)
    validation = prompts_of(val_sources)
    val_sets = {name: prompts_of(own) for name, own in set_sources.items()}
    evaluated = [*val_sources, *(source for own in set_sources.values() for source in own)]
    check_renamed(config, [*sources, *evaluated], problems)
    if problems:
        raise_if_any([*problems, *refused])
    for some in ([] if config.streaming else sources, val_sources, *set_sources.values()):
        _check_something_left(config, [source.counts for source in some])
    _check_is_held_out(config, train, validation)
    sizes = [] if config.streaming else [source.counts.used for source in sources]
    if not config.val_dataset:
        train, validation, sizes = _split(config, train, sizes, seed=seed)
    return PromptData(
        train,
        validation[: config.max_eval_prompts],
        sizes,
        [source.counts for source in (*sources, *evaluated)],
        streams,
        refused,
        renderer.notices,
        {name: prompts[: config.max_eval_prompts] for name, prompts in val_sets.items()},
    )


# --- stages --------------------------------------------------------------------------------------

_Taken = tuple[Source, Row, int]
"""A row that is used, and the number of its copy: 0 for the row itself, from 1 for repetitions."""


def _load_rows(
    sources: list[Source],
    config: DataConfig,
    renderer: Renderer,
    problems: list[Problem],
    *,
    seed: int,
) -> list[_Taken]:
    """The rows to use of each dataset, rendered."""
    taken: list[_Taken] = []
    seen: set[tuple[int, ...]] = set()
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


def _sample(rows: list[Row], source: Source, *, seed: int) -> list[tuple[Row, int]]:
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


def _drop_duplicates(rows: list[Row], seen: set[tuple[int, ...]]) -> None:
    """Drop rows with the prompt of an earlier row."""
    for row in rows:
        text = tuple(row.token_ids)
        if row.is_usable and text in seen:
            row.dropped = DUPLICATE
        elif row.is_usable:
            seen.add(text)


def _make_prompts(
    taken: list[_Taken], check: RowCheck | None, refused: list[Problem]
) -> list[Prompt]:
    """Give all prompts the same columns, so that a reward never misses an argument."""
    names = list(dict.fromkeys(name for _, row, _ in taken for name in row.columns))
    prompts = [row.to_prompt(source.prompt_id(row, copy), names) for source, row, copy in taken]
    if check is not None:
        pairs = zip(taken, prompts, strict=True)
        asked = [(row.location, prompt.columns) for (_, row, copy), prompt in pairs if not copy]
        found = [(location, text) for location, columns in asked for text in check(columns)]
        if len(asked) == len(found) > 1 and len({text for _, text in found}) == 1:
            found = [("every row", found[0][1])]
        refused += [Problem(f"{location}: {text}") for location, text in found]
    return prompts


def _check_something_left(config: DataConfig, counts: list[SourceCounts]) -> None:
    """Refuse data without a prompt, and a dataset with a weight but without a prompt."""
    empty = [count for count in counts if not count.used]
    if not empty or (len(empty) < len(counts) and not config.dataset_weights):
        return
    some = counts if len(empty) == len(counts) else empty[:1]
    lengths = [length for count in some for length in count.lengths]
    names = ", ".join(count.source for count in some)
    if not lengths:
        raise ValueError(f"no row of {names} is left: the preprocessor leaves out all of them.")
    found = f"{min(lengths)} to {max(lengths)}"
    most = config.max_prompt_length
    if min(lengths) > most:
        number = sum(count.lengths.total() for count in some)
        raise ValueError(
            f"every prompt of {names} is over data.max_prompt_length = {most} tokens: the "
            f"{number} rows have {found}. Raise it."
        )
    raise ValueError(
        f"no prompt of {names} is left: they have {found} tokens, data.min_prompt_length is "
        f"{config.min_prompt_length} and data.max_prompt_length {most}."
    )


def _check_is_held_out(config: DataConfig, train: list[Prompt], validation: list[Prompt]) -> None:
    if config.val_dataset and texts_of(validation) <= texts_of(train):
        raise ValueError(
            f"every prompt of data.val_dataset ({', '.join(config.val_dataset)}) is in the "
            "training data too. Leave val_dataset empty and set split_dataset_ratio."
        )


def _split(
    config: DataConfig, prompts: list[Prompt], sizes: list[int], *, seed: int
) -> tuple[list[Prompt], list[Prompt], list[int]]:
    """Training and held-out prompts by data.split_dataset_ratio, and the sizes that are left."""
    train, validation = split_prompts(prompts, config.split_dataset_ratio, seed=seed)
    kept = {prompt.prompt_id for prompt in train}
    remaining = iter(prompts)
    sizes = [sum(p.prompt_id in kept for p in islice(remaining, size)) for size in sizes]
    if config.dataset_weights and 0 in sizes and train:
        raise ValueError(
            f"data.split_dataset_ratio = {config.split_dataset_ratio} holds out every prompt "
            f"of {config.dataset[sizes.index(0)]}, which has a weight in data.dataset_weights. "
            "Give it more rows, or use val_dataset."
        )
    return train, validation, sizes


def split_prompts(
    prompts: list[Prompt], ratio: float, *, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Split into training and validation, each in the given order; `ratio` goes to validation.

    Rows with the same rendered prompt stay together, so no prompt is both trained and evaluated on.

    Raises:
        ValueError: one of the two would be empty.
    """
    if ratio == 0.0:
        return prompts, []
    wanted = max(1, round(ratio * len(prompts)))
    texts = Counter(tuple(prompt.token_ids) for prompt in prompts)
    order = list(texts)
    random.Random(seed).shuffle(order)
    held_out: set[tuple[int, ...]] = set()
    num_held_out = 0
    while num_held_out < wanted and order:
        text = order.pop()
        held_out.add(text)
        num_held_out += texts[text]
    if not order:
        raise ValueError(
            f"data.split_dataset_ratio = {ratio} leaves nothing to train on: "
            f"{counted(len(prompts), 'row')} with {counted(len(texts), 'different prompt')}. Give "
            "more rows or a val_dataset."
        )
    return (
        [prompt for prompt in prompts if tuple(prompt.token_ids) not in held_out],
        [prompt for prompt in prompts if tuple(prompt.token_ids) in held_out],
    )


def texts_of(prompts: list[Prompt]) -> set[tuple[int, ...]]:
    """The different rendered prompts."""
    return {tuple(prompt.token_ids) for prompt in prompts}
