"""The datasets of a config, opened, and the stages from their rows to prompts or samples.

Source.rows    a file or table -> rows with their locations
Source.parse   columns renamed, the preprocessor, then messages and the columns for rewards
render_rows    the same for many rows, then the chat template and the limits of length
Source.make    what a rendered row becomes

`PromptSource` is for GRPO, `SampleSource` in `rlsys.data.samples` for supervised training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar, Generic, Literal

from rlsys.config import DataConfig, RowsConfig
from rlsys.config.dataset_spec import (
    COMPRESSED_SUFFIXES,
    FILE_SUFFIXES,
    TEXT_SUFFIXES,
    DatasetSpec,
    file_kind,
)
from rlsys.config.prompt_template import template_columns
from rlsys.data.counts import SourceCounts
from rlsys.data.file_bytes import foreign_content
from rlsys.data.formats import PROMPT_COLUMNS, columns_problem, parse_row
from rlsys.data.preprocess import NO_PREPROCESSOR, Preprocessor, open_dataset, preprocessors
from rlsys.data.render import Renderer
from rlsys.data.row import LEFT_OUT, TOO_LONG, TOO_SHORT, Row
from rlsys.data.streams.base import T
from rlsys.data.tables import read_hub, read_table
from rlsys.data.text_files import read_file
from rlsys.json_text import BadRow
from rlsys.problems import Problem, ProblemsError
from rlsys.registry import did_you_mean
from rlsys.text import counted
from rlsys.types import Prompt

Split = Literal["train", "validation"]
MAX_PROBLEMS_SHOWN = 10
"""Different problems of rows that one error lists; the others are counted."""
ALSO_NAMED = 4
"""Further rows with the same problem that are named."""


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise a ProblemsError with the first MAX_PROBLEMS_SHOWN of `problems`, if there are any."""
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        raise ProblemsError("the data", shown, len(problems) - len(shown))


@dataclass(slots=True)
class Source(ABC, Generic[T]):
    """One dataset of the config."""

    limits: ClassVar[str]
    """The fields that leave rows out by their length."""

    spec: DatasetSpec
    prefix: str
    """The start of its prompt ids."""
    split: Split
    config: RowsConfig
    preprocessor: Preprocessor | None
    counts: SourceCounts
    columns: dict[str, None] = field(default_factory=dict)
    """Names of the columns seen so far, in order, before data.columns renames them."""

    # --- stages ---

    def rows(self) -> Iterator[Row]:
        """All rows. JSON lines are not parsed yet, and a row that cannot be read has a problem.

        Raises:
            ValueError: the dataset as a whole cannot be read or prepared.
        """
        rows = self._stored_rows()
        if self.preprocessor is not None and self.preprocessor.takes_dataset:
            rows = self._prepared_rows(rows, self.preprocessor)
        for row in rows:
            row.location = f"{self.spec.name}, {row.location}"
            yield row

    def _stored_rows(self) -> Iterator[Row]:
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

    def _prepared_rows(self, rows: Iterator[Row], preprocessor: Preprocessor) -> Iterator[Row]:
        """The rows that `prepare_dataset` makes of all."""
        renamed = []
        for row in rows:
            try:
                renamed.append(preprocessor.function.rename(self._own_columns(row)))
            except BadRow as error:
                raise ValueError(f"{self.spec.name}, {row.location}: {error}") from None
        for number, columns in enumerate(preprocessor.prepare(renamed), start=1):
            yield Row(number, f"row {number} of prepare_dataset", columns)

    def parse(self, row: Row, *, need_prompt: bool = True) -> None:
        """Preprocess a row and read its messages; a row that cannot be used gets a problem.

        Without `need_prompt` a row may have no prompt, and its messages stay empty.
        """
        try:
            if self.preprocessor is None or not self.preprocessor.takes_dataset:
                row.columns = self._own_columns(row)
            made = (
                row.columns if self.preprocessor is None else self.preprocessor.apply(row.columns)
            )
            if made is None:
                row.dropped = LEFT_OUT
                return
            row.columns = made
            if need_prompt or any(made.get(name) is not None for name in self.readable_columns):
                self.read(row)
        except BadRow as error:
            row.problem = str(error)

    def row_id(self, row: Row, copy: int = 0) -> str:
        """An id that is unique within the split, and the same in every run."""
        return f"{self.prefix}:{row.number}{f'+{copy}' if copy else ''}"

    @property
    def cuts_rows(self) -> bool:
        """Whether `make` may return several for one row."""
        return False

    @property
    def readable_columns(self) -> tuple[str, ...]:
        """Columns of which a row needs one."""
        template = self.config.prompt_template
        return PROMPT_COLUMNS if template is None else tuple(template_columns(template))

    @abstractmethod
    def read(self, row: Row) -> None:
        """Read the messages in the columns of a row.

        Raises:
            BadRow: they cannot be used.
        """

    @abstractmethod
    def limit(self, row: Row) -> None:
        """Drop or cut a rendered row that is too long or too short."""

    @abstractmethod
    def make(self, row: Row, copy: int, names: list[str]) -> list[T]:
        """What a rendered row becomes, with the columns `names`, None where it lacks one."""

    @abstractmethod
    def nothing_left(self, names: str, lengths: list[int]) -> str:
        """What is wrong with datasets of which no row is used, given the tokens of all rows."""

    def _own_columns(self, row: Row) -> dict[str, Any]:
        """The columns of a row under the names that data.columns gives them."""
        row.read()
        self.columns.update(dict.fromkeys(row.columns))
        names = self.config.columns
        renamed = {names.get(name, name): value for name, value in row.columns.items()}
        if len(renamed) < len(row.columns):
            kept = [name for name in row.columns if name in names.values() and name not in names]
            more = f": the row has {kept[0]!r} already" if kept else ""
            raise BadRow(f"data.columns gives two columns one name{more}")
        return renamed

    def first_rows(self, limit: int) -> tuple[list[Row], list[Problem]]:
        """Parse the first `limit` rows: those that can be used, and the problems of the others."""
        try:
            rows = list(islice(self.rows(), limit))
        except ValueError as error:
            return [], [Problem(str(error))]
        for row in rows:
            self.parse(row)
        return [row for row in rows if row.is_usable], self.problems(rows)

    # --- problems ---

    @property
    def is_text_file(self) -> bool:
        """Whether it is a file on this machine that is read row by row."""
        spec = self.spec
        return spec.is_local and file_kind(spec.path) in TEXT_SUFFIXES and spec.path.is_file()

    def file_problem(self) -> str | None:
        """Why the file cannot be read; None if it can, or if the dataset is not a file."""
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

    def problems(self, rows: Sequence[Row]) -> list[Problem]:
        """The problems of `rows`, or one if no row is there or the columns lack a prompt."""
        if not rows:
            return [Problem(f"dataset {self.spec.text!r} has no rows")]
        whole = self.columns_problem()
        return self.row_problems(rows) if whole is None else [whole]

    def row_problems(self, rows: Iterable[Row]) -> list[Problem]:
        """The problems of `rows`; rows with the same one are listed together."""
        by_text: dict[str, list[str]] = {}
        for row in rows:
            if row.problem:
                by_text.setdefault(row.problem, []).append(row.location)
        return [
            Problem(f"{first}: {text}{self._also(others)}")
            for text, (first, *others) in by_text.items()
        ]

    def _also(self, others: list[str]) -> str:
        """Further rows with the same problem: " (also line 2, line 3 and 17 more rows)"."""
        named = [place.removeprefix(f"{self.spec.name}, ") for place in others[:ALSO_NAMED]]
        more = len(others) - len(named)
        rest = f" and {counted(more, 'more row')}" if more else ""
        return f" (also {', '.join(named)}{rest})" if named else ""

    def columns_problem(self) -> Problem | None:
        """What the columns lack in every row; None if the preprocessor may add it."""
        if self.preprocessor is not None or not self.columns:
            return None
        names, template = self.config.columns, self.config.prompt_template
        found = [names.get(name, name) for name in self.columns]
        if template is not None:
            lacking = [name for name in template_columns(template) if name not in found]
            return self._unknown_columns(lacking, found) if lacking else None
        problem = columns_problem(found, self.readable_columns)
        if problem is None:
            return None
        known, remedy = preprocessors.known(), ""
        if known:
            of_validation = self.split == "validation" and self.config.val_preprocessor
            option = "--data.val_preprocessor" if of_validation else "--data.preprocessor"
            these = f"one of {', '.join(known)}" if len(known) > 1 else known[0]
            remedy = f". The loaded plugins register {these}: name it with {option} {known[0]}"
        return Problem(f"dataset {self.spec.text!r} {problem}{remedy}")

    def _unknown_columns(self, lacking: list[str], found: list[str]) -> Problem:
        return Problem(
            f"data.prompt_template names {', '.join(map(repr, lacking))}, and dataset "
            f"{self.spec.text!r} has the columns {', '.join(found)}."
            f"{did_you_mean(lacking[0], found)}"
        )


@dataclass(slots=True)
class PromptSource(Source[Prompt]):
    """One dataset, whose rows become prompts."""

    limits: ClassVar[str] = "data.max_prompt_length and min_prompt_length"

    config: DataConfig

    def read(self, row: Row) -> None:
        """Read the prompt, and the answer that rewards find in the column `solution`."""
        parse_row(row, system=self.config.system, template=self.config.prompt_template)

    def limit(self, row: Row) -> None:
        """Drop a rendered row that is too long or too short."""
        length, most = len(row.token_ids), self.config.max_prompt_length
        if length > most and self.config.overlong_prompts == "error":
            row.problem = (
                f"the prompt has {length:,} tokens, more than data.max_prompt_length = {most:,}. "
                "Raise it, or set data.overlong_prompts to drop"
            )
        elif length > most:
            row.dropped = TOO_LONG
        elif length < self.config.min_prompt_length:
            row.dropped = TOO_SHORT

    def make(self, row: Row, copy: int, names: list[str]) -> list[Prompt]:
        """One prompt."""
        return [row.to_prompt(self.row_id(row, copy), names)]

    def nothing_left(self, names: str, lengths: list[int]) -> str:
        """The limits of length."""
        low, most = self.config.min_prompt_length, self.config.max_prompt_length
        found = f"{min(lengths)} to {max(lengths)}"
        if min(lengths) > most:
            return (
                f"every prompt of {names} is over data.max_prompt_length = {most} tokens: the "
                f"{len(lengths)} rows have {found}. Raise it."
            )
        return (
            f"no prompt of {names} is left: they have {found} tokens, data.min_prompt_length is "
            f"{low} and data.max_prompt_length {most}."
        )


SourceKind = Callable[..., Source[T]]
"""A class of sources, or what makes one of its arguments."""


def render_rows(rows: Sequence[tuple[Source[T], Row]], renderer: Renderer) -> None:
    """Take rows through all stages; then each has token ids, a problem or a reason in `dropped`."""
    for source, row in rows:
        source.parse(row)
    renderer.render([row for _, row in rows if row.is_usable])
    for source, row in rows:
        if row.is_usable:
            source.limit(row)


def open_sources(
    kind: SourceKind[T], config: RowsConfig, split: Split, problems: list[Problem]
) -> list[Source[T]]:
    """The datasets of `split` in the order of the config, without reading them.

    Datasets that the config describes wrongly are left out, with a problem.
    """
    texts, names = config.dataset, config.preprocessor
    if split == "validation":
        texts, names = config.val_dataset, config.val_preprocessor or config.preprocessor
    if len(names) <= 1 or not texts:
        names = (names or [NO_PREPROCESSOR]) * len(texts)
    opened: list[tuple[DatasetSpec, Preprocessor | None]] = []
    for text, name in zip(texts, names, strict=True):
        try:
            opened.append(open_dataset(text, name))
        except ValueError as error:
            problems.append(Problem(str(error)))
    rows = Counter(spec.same_rows for spec, _ in opened)
    for (name, *_), count in rows.items():
        if count > 1:
            text = (
                f"a dataset is listed twice: {name}. To see its rows more often, give it a "
                "weight in data.dataset_weights, or more rows than it has behind #"
            )
            problems.append(Problem(text))
    stems = [spec.stem for spec, _ in opened]
    return [
        kind(
            spec,
            # Two files of one name get their whole path, so that prompt ids are unique.
            spec.stem if stems.count(spec.stem) == 1 else spec.long_name,
            split,
            config,
            preprocessor,
            SourceCounts(spec.text, "" if preprocessor is None else preprocessor.name),
        )
        for spec, preprocessor in opened
    ]


def open_set(
    kind: SourceKind[T], config: RowsConfig, name: str, problems: list[Problem]
) -> list[Source[T]]:
    """The datasets of one of data.val_sets, without reading them; as `open_sources`.

    Its name stands in the prompt ids, since two sets may have files of one name.
    """
    own = config.model_copy(update={"val_dataset": config.val_sets[name]})
    sources = open_sources(kind, own, "validation", problems)
    return [replace(source, prefix=f"{name}/{source.prefix}") for source in sources]


def check_renamed(
    config: RowsConfig, sources: Sequence[Source[T]], problems: list[Problem]
) -> None:
    """Note a name in data.columns that no dataset has: most likely a typing error."""
    found = list(dict.fromkeys(name for source in sources for name in source.columns))
    for name in config.columns:
        if found and name not in found:
            text = (
                f"data.columns renames {name!r}, which no dataset has.{did_you_mean(name, found)} "
                f"The columns are: {', '.join(found)}"
            )
            problems.append(Problem(text))
