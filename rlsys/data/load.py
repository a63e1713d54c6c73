"""From the datasets of a config to prompts ready to sample from, all in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rlsys.config import Config, DataConfig
from rlsys.data.readers import BadRow
from rlsys.data.render import ChatTemplate
from rlsys.data.reward_columns import RowCheck, row_check
from rlsys.data.rows import ParsedRow
from rlsys.data.sources import (
    Problems,
    Source,
    SourceCounts,
    check_renamed,
    open_sources,
    sampled,
)
from rlsys.data.split import sizes_after_split, split_prompts, texts_of
from rlsys.data.streams.streamed import StreamedPrompts
from rlsys.rewards import load_plugins, plugin_problems
from rlsys.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_BATCH = 1000
"""Prompts tokenised together: enough to keep the tokenizer busy."""


@dataclass(frozen=True, slots=True)
class PromptData:
    """The prompts of a run."""

    train: list[Prompt]
    """In the order of the datasets and their rows."""
    validation: list[Prompt]
    """Held out, at most max_eval_prompts; empty when nothing is evaluated."""
    train_sizes: list[int]
    """How many of `train` come from each entry of data.dataset, in order."""
    counts: list[SourceCounts] = field(default_factory=list)
    """What became of the rows of each dataset, training data first."""
    num_validation_in_train: int = 0
    """Held-out prompts that are trained on as well."""
    streams: list[StreamedPrompts] = field(default_factory=list)
    """With data.streaming what `train` is read from: one stream for all datasets, or one for each
    where they have weights. Then `train` is empty."""

    refused: Problems = field(default_factory=Problems)
    """Rows of which `check` found something wrong."""
    notices: list[str] = field(default_factory=list)
    """What rows have and their prompts lack, and values that are missing in prompts."""

    @property
    def columns(self) -> list[str]:
        """What every training prompt carries to the rewards; of streamed rows, the first ones."""
        if self.streams:
            return list(self.streams[0].columns)
        return list(self.train[0].columns)

    @property
    def unsaveable(self) -> list[str]:
        """Columns of streamed rows that no checkpoint can hold, and what to do."""
        return [text for stream in self.streams for text in stream.unsaveable.values()]

    def summary(self) -> list[str]:
        """Lines that account for every row, and name what prompts lack of them."""
        if self.streams:
            names = [count.source for stream in self.streams for count in stream.counts]
            streamed = f"data: {', '.join(names)}: streamed, rows are checked as they come"
            lines = [streamed, *(f"data: {count}" for count in self.counts[len(names) :])]
        else:
            lines = [f"data: {count}" for count in self.counts]
        if self.num_validation_in_train:
            lines.append(
                f"data: {self.num_validation_in_train:,} of {len(self.validation):,} held-out "
                "prompts are in the training data too, so eval/ looks better than it should"
            )
        return lines + [f"data: {notice}" for notice in self.notices]


def load_checked_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptData:
    """The prompts of a run, and what its reward functions say of their rows.

    Raises:
        ValueError: as `load_prompts`; a plugin that cannot be loaded. Rows that reward functions
            refuse are in the result.
    """
    reward = config.reward
    list(plugin_problems("", config.data.external_plugins))  # `load_prompts` reports them
    load_plugins(reward.external_plugins)
    check = row_check(reward.names_that_check_rows, reward.params, config.known_to_rewards)
    return load_prompts(config.data, tokenizer, seed=config.seed, check=check)


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
        seed: of what is drawn.
        check: asked about the columns of every row that is used, streamed ones left out.

    Raises:
        ValueError: everything that is wrong, up to a number: datasets that are not there or cannot
            be read, rows that are not what they should be; a tokenizer without chat template; no
            prompt left.
    """
    template = ChatTemplate(tokenizer, config.chat_template_kwargs)
    problems = Problems()
    for problem in plugin_problems("data.external_plugins", config.external_plugins):
        problems.add(problem)
    sources = open_sources(config, "train", problems)
    val_sources = open_sources(config, "validation", problems)
    refused = Problems()
    streams: list[StreamedPrompts] = []
    train: list[Prompt] = []
    sizes: list[int] = []
    counts: list[SourceCounts] = []
    if config.streaming:
        streams = _open_streams(sources, config, template, problems, seed=seed)
        counts = [count for stream in streams for count in stream.counts]
    else:
        rows, counts = _load_split(sources, config, template, problems, seed=seed)
        train, sizes = _prompts(rows, template, check, refused), [len(some) for some in rows]
    rows, more_counts = _load_split(val_sources, config, template, problems, seed=seed)
    validation, val_sizes = _prompts(rows, template, check, refused), [len(some) for some in rows]
    check_renamed(config, [*sources, *val_sources], problems)
    if problems:
        problems.add_all(refused)
    problems.raise_if_any()
    _check_something_left(config, sizes, [] if config.streaming else counts)
    _check_something_left(config, val_sizes, more_counts)
    if config.val_dataset:
        if texts_of(validation) <= texts_of(train):
            raise ValueError(
                f"every prompt of data.val_dataset ({', '.join(config.val_dataset)}) is in the "
                "training data too. Leave val_dataset empty and set split_dataset_ratio."
            )
    else:
        everything = train
        train, validation = split_prompts(train, config.split_dataset_ratio, seed=seed)
        sizes = sizes_after_split(everything, train, sizes)
        if config.dataset_weights and 0 in sizes and train:
            raise ValueError(
                f"data.split_dataset_ratio = {config.split_dataset_ratio} holds out every prompt "
                f"of {config.dataset[sizes.index(0)]}, which has a weight in data.dataset_weights. "
                "Give it more rows, or use val_dataset."
            )
    validation = validation[: config.max_eval_prompts]
    known = texts_of(train)
    return PromptData(
        train,
        validation,
        sizes,
        [*counts, *more_counts],
        sum(tuple(prompt.token_ids) in known for prompt in validation),
        streams,
        refused,
        template.notices,
    )


# --- one split -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    """A row that is understood, on its way to become a prompt."""

    number: int
    """Within its dataset, which `where` need not be."""
    prompt_id: str
    where: str
    parsed: ParsedRow
    copy: int
    """0 for the row itself, from 1 for its repetitions by `#ROWS`."""
    token_ids: list[int] = field(default_factory=list)


def _load_split(
    sources: list[Source],
    config: DataConfig,
    template: ChatTemplate,
    problems: Problems,
    *,
    seed: int,
) -> tuple[list[list[_Row]], list[SourceCounts]]:
    """The rows to use of each dataset, and what became of all."""
    counts = [SourceCounts(source.spec.text, source.preparation.name) for source in sources]
    rows_of = []
    seen: set[tuple[int, ...]] = set()
    for source, count in zip(sources, counts, strict=True):
        rows = _read(source, count, problems, seed=seed)
        rows = _rendered(rows, template, problems)
        count.lengths = [len(row.token_ids) for row in rows]
        rows = _in_bounds(rows, config, count, problems)
        if config.deduplicate and source.split == "train":
            rows = _without_duplicates(rows, seen, count)
        count.used = len(rows)
        rows_of.append(rows)
    return rows_of, counts


def _open_streams(
    sources: list[Source],
    config: DataConfig,
    template: ChatTemplate,
    problems: Problems,
    *,
    seed: int,
) -> list[StreamedPrompts]:
    parts = [[source] for source in sources] if config.dataset_weights else [sources]
    streams = [StreamedPrompts(part, template, config, seed=seed) for part in parts if part]
    for stream in streams:
        stream.check_first_rows(problems)
    # One set of columns for all, so that a reward misses no argument.
    columns = {name: None for stream in streams for name in stream.columns}
    for stream in streams:
        stream.columns = columns
    return streams


def _read(source: Source, count: SourceCounts, problems: Problems, *, seed: int) -> list[_Row]:
    bad: list[str] = []
    rows: dict[int, _Row | None] = {}
    found: list[_Row] = []
    try:
        taken = sampled(source.raw_rows(), source, seed=seed)
    except ValueError as error:
        problems.add(error)
        return []
    if not taken:
        problems.add(source.no_rows())
    count.rows = len(taken)
    for raw, copy in taken:
        if raw.number not in rows:
            try:
                parsed = source.understand(raw)
            except BadRow as error:
                bad.append(f"{source.where(raw)}: {error}")
                parsed = None
            else:
                count.filtered += parsed is None
            made = None
            if parsed is not None:
                made = _Row(raw.number, source.prompt_id(raw), source.where(raw), parsed, 0)
            rows[raw.number] = made
        else:
            made = rows[raw.number]
            count.filtered += made is None
            if made is not None:
                made = replace(made, prompt_id=f"{made.prompt_id}+{copy}", copy=copy)
        if made is not None:
            count.formats[made.parsed.format] += 1
            found.append(made)
    of_all = source.problem_of_all_rows()
    for text in [of_all] if of_all is not None else bad:
        problems.add(text)
    return found


def _rendered(rows: list[_Row], template: ChatTemplate, problems: Problems) -> list[_Row]:
    originals = [row for row in rows if not row.copy]
    for start in range(0, len(originals), RENDER_BATCH):
        some = originals[start : start + RENDER_BATCH]
        rendered = template.render([(row.where, row.parsed) for row in some])
        for row, token_ids in zip(some, rendered, strict=True):
            if isinstance(token_ids, str):
                problems.add(f"{row.where}: {token_ids}")
            else:
                row.token_ids = token_ids
    of_row = {row.number: row.token_ids for row in originals}
    for row in rows:
        row.token_ids = of_row[row.number]
    return [row for row in rows if row.token_ids]


def _in_bounds(
    rows: list[_Row], config: DataConfig, count: SourceCounts, problems: Problems
) -> list[_Row]:
    kept = []
    for row in rows:
        try:
            if count.within_limits(len(row.token_ids), config):
                kept.append(row)
        except BadRow as error:
            problems.add(f"{row.where}: {error}")
    return kept


def _without_duplicates(
    rows: list[_Row], seen: set[tuple[int, ...]], count: SourceCounts
) -> list[_Row]:
    """The first row of each prompt; copies that `#ROWS` asks for stay with it."""
    kept = []
    kept_rows: set[int] = set()
    for row in rows:
        text = tuple(row.token_ids)
        if text not in seen:
            seen.add(text)
            kept_rows.add(row.number)
        if row.number in kept_rows:
            kept.append(row)
        else:
            count.duplicates += 1
    return kept


def _prompts(
    rows_of: list[list[_Row]], template: ChatTemplate, check: RowCheck | None, refused: Problems
) -> list[Prompt]:
    rows = [row for some in rows_of for row in some]
    # A reward sees None where another row has a column, and never misses an argument.
    names = list(dict.fromkeys(name for row in rows for name in row.parsed.columns))
    prompts = [
        Prompt(
            row.prompt_id,
            row.parsed.messages,
            row.token_ids,
            {name: row.parsed.columns.get(name) for name in names},
            template.opens_think(row.token_ids),
        )
        for row in rows
    ]
    if check is not None:
        asked = [(row, prompt) for row, prompt in zip(rows, prompts, strict=True) if not row.copy]
        found = [(row.where, text) for row, prompt in asked for text in check(prompt.columns)]
        if len(asked) == len(found) > 1 and len({text for _, text in found}) == 1:
            found = [("every row", found[0][1])]
        for where, text in found:
            refused.add(f"{where}: {text}")
    return prompts


def _check_something_left(config: DataConfig, sizes: list[int], counts: list[SourceCounts]) -> None:
    """Each dataset that has a weight, and all together, must have a prompt.

    Raises:
        ValueError: with the lengths that there are.
    """
    together = [counts] if counts and not any(sizes) else []
    alone = [[count] for count in counts if not count.used] if config.dataset_weights else []
    for some in together or alone:
        raise ValueError(_nothing_left(config, some))


def _nothing_left(config: DataConfig, counts: list[SourceCounts]) -> str:
    lengths = [length for count in counts for length in count.lengths]
    sources = ", ".join(count.source for count in counts)
    if not lengths:
        return f"no row of {sources} is left: the preprocessor leaves out all of them."
    if min(lengths) > config.max_prompt_length:
        return (
            f"every prompt of {sources} is over data.max_prompt_length = "
            f"{config.max_prompt_length} tokens: the {len(lengths)} rows have {min(lengths)} to "
            f"{max(lengths)}. Raise it."
        )
    return (
        f"no prompt of {sources} is left: they have {min(lengths)} to {max(lengths)} tokens, "
        f"data.min_prompt_length is {config.min_prompt_length} and data.max_prompt_length "
        f"{config.max_prompt_length}."
    )
