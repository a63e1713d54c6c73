"""The datasets of a config, opened: rows with their places, renamed, preprocessed, understood."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from rlsys.config import DataConfig
from rlsys.data.preprocess import (
    NO_PREPROCESSOR,
    Preparation,
    keep_row,
    open_dataset,
    preprocessors,
)
from rlsys.data.raw import foreign_content
from rlsys.data.readers import BadRow, RawRow, read_file
from rlsys.data.rows import ParsedRow, columns_problem, parse_row
from rlsys.data.spec import (
    COMPRESSED_SUFFIXES,
    FILE_SUFFIXES,
    TEXT_SUFFIXES,
    DatasetSpec,
    file_kind,
)
from rlsys.data.tables import read_hub, read_table
from rlsys.problems import Problem, ProblemsError
from rlsys.registry import did_you_mean

Split = Literal["train", "validation"]
MAX_PROBLEMS_SHOWN = 10
"""Bad rows that one error lists; the others are counted."""


class Problems:
    """What is wrong with the data: the first few as texts, the others as a number."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.num_more = 0

    def __bool__(self) -> bool:
        return bool(self.texts)

    def add(self, text: object) -> None:
        """Note one more."""
        if len(self.texts) < MAX_PROBLEMS_SHOWN:
            self.texts.append(str(text))
        else:
            self.num_more += 1

    def add_all(self, others: Problems) -> None:
        """Note those of `others`."""
        for text in others.texts:
            self.add(text)
        self.num_more += others.num_more

    def raise_if_any(self) -> None:
        """Tell all of them at once.

        Raises:
            ProblemsError: there are any.
        """
        if self:
            raise ProblemsError("the data", list(map(Problem, self.texts)), self.num_more)


@dataclass(slots=True)
class SourceCounts:
    """What became of the rows of one dataset: `rows` is the sum of all below `formats`."""

    source: str
    """As it stands in the config."""
    preprocessor: str = ""
    """What its rows went through, named by the config or by a registered dataset."""
    rows: int = 0
    """Read, or taken by `#ROWS`, copies included."""
    formats: Counter[str] = field(default_factory=Counter)
    """Rows by format."""
    filtered: int = 0
    """Left out by the preprocessor."""
    too_long: int = 0
    """Over max_prompt_length."""
    too_short: int = 0
    """Under min_prompt_length."""
    duplicates: int = 0
    """Of a prompt that is there already."""
    used: int = 0
    """Prompts, before any are held out."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of every rendered prompt, before the limits."""

    def within_limits(self, length: int, config: DataConfig) -> bool:
        """Whether a prompt of `length` tokens is used; counts it where it is not.

        Raises:
            BadRow: it is too long, and data.overlong_prompts says that this is an error.
        """
        if length > config.max_prompt_length:
            self.too_long += 1
            if config.overlong_prompts == "error":
                raise BadRow(
                    f"the prompt has {length:,} tokens, more than data.max_prompt_length = "
                    f"{config.max_prompt_length:,}. Raise it, or set data.overlong_prompts to drop"
                )
            return False
        self.too_short += length < config.min_prompt_length
        return length >= config.min_prompt_length

    def dropped(self) -> dict[str, int]:
        """Rows that are not used, by the reason."""
        return {
            "left out by the preprocessor": self.filtered,
            "over data.max_prompt_length": self.too_long,
            "under data.min_prompt_length": self.too_short,
            "duplicates": self.duplicates,
        }

    def __str__(self) -> str:
        through = f" through {self.preprocessor}" if self.preprocessor else ""
        text = f"{self.source}{through}: {self.used:,} of {self.rows:,} rows used"
        dropped = [f"{count:,} {reason}" for reason, count in self.dropped().items() if count]
        return text + (f"; dropped: {', '.join(dropped)}" if dropped else "")


@dataclass(slots=True)
class Source:
    """One dataset of the config."""

    spec: DatasetSpec
    prefix: str
    """What its prompt ids start with."""
    split: Split
    config: DataConfig
    preparation: Preparation
    columns: dict[str, None] = field(default_factory=dict)
    """Names of the columns seen so far, in order, as they stand in the data."""

    def raw_rows(self) -> Iterator[RawRow]:
        """All rows, not parsed yet, from the first one.

        Raises:
            ValueError: the dataset as a whole cannot be read or prepared.
        """
        rows = self._stored_rows()
        return rows if self.preparation.whole is None else self._prepared_rows(rows)

    def _prepared_rows(self, rows: Iterator[RawRow]) -> Iterator[RawRow]:
        """The rows that `prepare_dataset` makes of all."""
        assert self.preparation.whole is not None
        renamed = []
        for raw in rows:
            try:
                renamed.append(self.preparation.whole.rename(self._own_columns(raw)))
            except BadRow as error:
                raise ValueError(f"{self.where(raw)}: {error}") from None
        for number, row in enumerate(self.preparation.prepared(renamed), start=1):
            yield RawRow(number, f"row {number} of prepare_dataset", row)

    def _own_columns(self, raw: RawRow) -> dict[str, Any]:
        """The columns of a row under the names that data.columns gives them."""
        values = raw.values()
        self.columns.update(dict.fromkeys(values))
        return _renamed(values, self.config.columns)

    def _stored_rows(self) -> Iterator[RawRow]:
        spec, limit = self.spec, self.config.max_row_mb
        if not spec.is_local or spec.path.is_dir():
            return read_hub(
                spec,
                evaluation=self.split == "validation",
                streaming=self.config.streaming and self.split == "train",
                max_row_mb=limit,
            )
        problem = self.file_problem()
        if problem is not None:
            raise ValueError(problem)
        if file_kind(spec.path) in TEXT_SUFFIXES:
            return read_file(spec.path, max_row_mb=limit)
        return read_table(spec.path, streaming=self.config.streaming)

    @property
    def is_text_file(self) -> bool:
        """Whether it is a file on this machine that is read row by row."""
        spec = self.spec
        return spec.is_local and file_kind(spec.path) in TEXT_SUFFIXES and spec.path.is_file()

    def file_problem(self) -> str | None:
        """Why there is no file of a known kind; None when there is one, or it is no file."""
        path = self.spec.path
        if not self.spec.is_local or path.is_dir():
            return None
        if not path.exists():
            return (
                f"dataset {self.spec.text!r} does not exist (looked for {path.resolve()}). "
                "Relative paths start at the working directory."
            )
        if not file_kind(path):
            return (
                f"dataset {self.spec.text!r} must be a file in {', '.join(FILE_SUFFIXES)}; texts "
                f"may be compressed ({', '.join(COMPRESSED_SUFFIXES)})"
            )
        foreign = foreign_content(path)
        return None if foreign is None else f"dataset {self.spec.text!r} {foreign}"

    def understand(self, raw: RawRow) -> ParsedRow | None:
        """Columns renamed, preprocessed, and parsed; None when the preprocessor leaves it out.

        Raises:
            BadRow: the row cannot be used.
        """
        prepared = self.prepared(raw)
        return None if prepared is None else parse_row(prepared, system=self.config.system)

    def prepared(self, raw: RawRow) -> dict[str, Any] | None:
        """Columns renamed and preprocessed; None when the preprocessor leaves the row out.

        Raises:
            BadRow: the row cannot be used.
        """
        is_prepared = self.preparation.whole is not None
        values = raw.values() if is_prepared else self._own_columns(raw)
        return self.preparation.each(values)

    def first_rows(self, limit: int) -> tuple[list[tuple[str, ParsedRow]], list[str]]:
        """Those of the first `limit` rows that can be used, and what is wrong with the others.

        Each comes with its place.

        A problem of the dataset as a whole is told instead of those of its rows.
        """
        parsed: list[tuple[str, ParsedRow]] = []
        bad: list[str] = []
        num_rows = 0
        try:
            for raw in islice(self.raw_rows(), limit):
                num_rows += 1
                try:
                    row = self.understand(raw)
                except BadRow as error:
                    bad.append(f"{self.where(raw)}: {error}")
                else:
                    parsed += [] if row is None else [(self.where(raw), row)]
        except ValueError as error:
            return [], [str(error)]
        problems = [] if num_rows else [self.no_rows()]
        of_all = self.problem_of_all_rows()
        return parsed, problems + (bad if of_all is None else [of_all])

    def no_rows(self) -> str:
        """What to tell about a dataset without rows."""
        return f"dataset {self.spec.text!r} has no rows"

    def where(self, raw: RawRow) -> str:
        """The place of a row, for people."""
        return f"{self.spec.name}, {raw.place}"

    def prompt_id(self, raw: RawRow) -> str:
        """Unique within the split, and the same in every run."""
        return f"{self.prefix}:{raw.number}"

    def problem_of_all_rows(self) -> str | None:
        """What its columns lack, told once instead of for every row."""
        if self.preparation.each is not keep_row or not self.columns:
            return None  # the columns of the preprocessor's rows are not known
        names = self.config.columns
        problem = columns_problem([names.get(name, name) for name in self.columns])
        if problem is None:
            return None
        return f"dataset {self.spec.text!r} {problem}{self._preprocessors()}"

    def _preprocessors(self) -> str:
        """What the loaded plugins offer to make prompts of these rows; empty if nothing."""
        known = preprocessors.known()
        if not known:
            return ""
        of_validation = self.split == "validation" and self.config.val_preprocessor
        option = "--data.val_preprocessor" if of_validation else "--data.preprocessor"
        these = f"one of {', '.join(known)}" if len(known) > 1 else known[0]
        return f". The loaded plugins register {these}: name it with {option} {known[0]}"


def open_sources(config: DataConfig, split: Split, problems: Problems) -> list[Source]:
    """The datasets of `split` in the order of the config, without reading them.

    Those that the config describes wrongly are told in `problems`, and left out.
    """
    texts = config.dataset if split == "train" else config.val_dataset
    specs: list[tuple[DatasetSpec, Preparation]] = []
    for text, name in zip(texts, preprocessor_names(config, split), strict=True):
        try:
            specs.append(open_dataset(text, name))
        except ValueError as error:
            problems.add(error)
    rows = [spec.same_rows for spec, _ in specs]
    for spec in {spec.same_rows: spec for spec, _ in specs}.values():
        if rows.count(spec.same_rows) > 1:
            problems.add(
                f"a dataset is listed twice: {spec.name}. To see its rows more often, give it a "
                "weight in data.dataset_weights, or more rows than it has behind #"
            )
    stems = [spec.stem for spec, _ in specs]
    return [
        # Two files of one name are told apart by their whole path.
        Source(
            spec,
            spec.stem if stems.count(spec.stem) == 1 else spec.long_name,
            split,
            config,
            preparation,
        )
        for spec, preparation in specs
    ]


def check_renamed(config: DataConfig, sources: list[Source], problems: Problems) -> None:
    """Note a name in data.columns that no dataset has: most likely a typing error."""
    found = list(dict.fromkeys(name for source in sources for name in source.columns))
    for name in config.columns:
        if found and name not in found:
            problems.add(
                f"data.columns renames {name!r}, which no dataset has.{did_you_mean(name, found)} "
                f"The columns are: {', '.join(found)}"
            )


def preprocessor_names(config: DataConfig, split: Split) -> list[str]:
    """One for each dataset of `split`."""
    names, texts = config.preprocessor, config.dataset
    if split == "validation":
        names, texts = config.val_preprocessor or config.preprocessor, config.val_dataset
    if len(names) <= 1 or not texts:
        return (names or [NO_PREPROCESSOR]) * len(texts)
    return names


def sampled(rows: Iterable[RawRow], source: Source, *, seed: int) -> list[tuple[RawRow, int]]:
    """The rows that `#ROWS` takes, each with the number of its copy, from 0; without it all.

    As in ms-swift: fewer rows than there are, are drawn without replacement; more are the whole
    dataset as often as it fits, and the rest drawn. Unshuffled, and for evaluation, the first ones
    are taken instead.

    Raises:
        ValueError: evaluation data is asked for more rows than it has.
    """
    everything = list(rows)
    wanted = source.spec.num_rows
    if wanted is None or not everything:
        return [(row, 0) for row in everything]
    if source.split == "validation" and wanted > len(everything):
        raise ValueError(
            f"dataset {source.spec.text!r} has {len(everything):,} rows, and evaluating one twice "
            "tells nothing new: ask for at most so many"
        )
    copies, rest = divmod(wanted, len(everything))
    some = list(range(rest))
    if source.config.shuffle and source.split == "train":
        drawing = random.Random(f"{seed}:sample:{source.prefix}")
        some = sorted(drawing.sample(range(len(everything)), rest))
    taken = [(row, copy) for copy in range(copies) for row in everything]
    return taken + [(everything[index], copies) for index in some]


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    if not names:
        return values
    renamed = {names.get(name, name): value for name, value in values.items()}
    if len(renamed) < len(values):
        kept = [name for name in values if name in names.values() and name not in names]
        raise BadRow(
            f"data.columns gives two columns one name: the row has {kept[0]!r} already"
            if kept
            else "data.columns gives two columns one name"
        )
    return renamed
