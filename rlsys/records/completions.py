"""Completions of a run, filtered and sorted by DuckDB.

Conditions come from users and from visitors of the dashboard's page. So each query has a database
of its own in memory, which holds the completions and can neither read nor write anything else.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from rlsys.records.columns import DERIVED, PLACE, STORED, quoted, text_literal, view_columns
from rlsys.records.index import CompletionIndex
from rlsys.run.folder import RunDir
from rlsys.tracking.base import Split

if TYPE_CHECKING:
    import pyarrow

MEMORY_LIMIT = "4GB"
"""Of one query."""
MOST_PLACES = 1_000
"""Completions of a page, whose places are looked for before their texts are read."""
_NEWEST_FIRST = ", ".join(f"{name} DESC" for name in PLACE)


@dataclass(frozen=True, slots=True)
class CompletionRows:
    """Some of the completions that fit a query."""

    columns: list[str]
    rows: list[dict[str, Any]]
    """Column -> value; `rewards` and `failures` are mappings by name."""
    total: int
    """Completions that fit, also those before `offset` and after `limit`."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which completions, in which order, and what about them."""

    where: str | None = None
    """One SQL expression over the columns, such as `countdown = 0 and format = 1`."""
    grep: str | None = None
    """Only completions whose text contains this."""
    steps: tuple[int | None, int | None] = (None, None)
    """First and last step; None is open."""
    sort: str | None = None
    """A column; None is the order in which completions were recorded."""
    descending: bool = True
    """Largest first; without `sort`, newest first."""
    offset: int = 0
    limit: int | None = None
    latest: bool = False
    """Without `sort`: the newest `limit` completions, in the order in which they were recorded."""
    groups: int | None = None
    """Only completions of the newest groups, this many; None is all."""
    columns: Sequence[str] | None = None
    """None is all that the rows in the file have, and their `id`."""


class Completions:
    """The completions of one kind of a run. Several threads may use it.

    Args:
        run: the folder.
        split: trained on, held out, or left out by dynamic sampling.
    """

    def __init__(self, run: RunDir, split: Split):
        self.path = run.completions_of(split)
        """The newest file."""
        self._index = CompletionIndex(self.path, run.cache)

    def columns(self) -> list[str]:
        """All columns that a query may name."""
        with self._opened(None) as (_, columns):
            return columns

    def query(self, query: Query, *, timeout_s: float | None = None) -> CompletionRows:
        """Completions as rows.

        Args:
            query: which ones.
            timeout_s: seconds after which the query is given up; None is no limit.

        Raises:
            ValueError: an unknown column, a condition that is not an expression over the columns,
                or a query that took too long or too much memory.
        """
        with self._opened(timeout_s) as (completions, columns), _explained(query, columns):
            chosen = _filtered(completions, query)
            if query.limit is not None and query.limit <= MOST_PLACES:
                total, chosen = _page(completions, chosen, query, columns)
                chosen = _ordered(chosen, query, columns)
            else:
                total = chosen.aggregate("count(*)").fetchall()[0][0]
                chosen = _cut(chosen, query, columns)
            relation = _projected(chosen, query, columns)
            names, kinds = relation.columns, [str(kind) for kind in relation.types]
            rows = [
                {n: _decoded(v, kind) for n, v, kind in zip(names, row, kinds, strict=True)}
                for row in relation.fetchall()
            ]
            return CompletionRows(names, rows, total)

    @contextmanager
    def batches(self, query: Query) -> Iterator[pyarrow.RecordBatchReader]:
        """Completions in batches of Arrow; the same errors as `query`."""
        with self._opened(None) as (completions, columns), _explained(query, columns):
            chosen = _cut(_filtered(completions, query), query, columns)
            yield _projected(chosen, query, columns).to_arrow_reader()

    def steps(self) -> tuple[int, int] | None:
        """The first and the last step that is recorded; None if there is no completion."""
        with self._opened(None) as (completions, _):
            first, last = completions.aggregate("min(step), max(step)").fetchall()[0]
            return None if first is None else (first, last)

    def group(self, completion_id: str) -> list[dict[str, Any]]:
        """The row of a completion, and then the other completions of its group.

        Raises:
            ValueError: no completion has this id.
        """
        step, group_id, index = read_id(completion_id)
        where = f"step = {step} and group_id = {group_id}"
        rows = self.query(Query(where=where, descending=False)).rows
        own = [row for row in rows if row["index"] == index]
        if not own:
            raise ValueError(f"no completion has the id {completion_id!r}")
        return [*own[:1], *(row for row in rows if row["index"] != index)]

    @contextmanager
    def _opened(
        self, timeout_s: float | None
    ) -> Iterator[tuple[duckdb.DuckDBPyRelation, list[str]]]:
        """All completions in a locked database, and their columns."""
        pieces, contents = self._index.pieces()
        columns = view_columns(contents.rewards, contents.further)
        stored = [*STORED, *contents.further]
        with duckdb.connect(config={"memory_limit": MEMORY_LIMIT}) as connection:
            files = [str(piece) for piece in pieces if isinstance(piece, Path)]
            connection.execute(f"SET allowed_paths = {_list(files)}")
            selects = [_select_nothing(stored), *_selects(connection, pieces)]
            expressions = [f"{value} AS {quoted(name)}" for name, value in columns.items()]
            connection.execute(
                f"CREATE VIEW completions AS SELECT {', '.join([*expressions, *PLACE])} FROM "
                f"({' UNION ALL BY NAME '.join(selects)})"
            )
            for setting in (
                "python_enable_replacements = false",
                "temp_directory = ''",
                "enable_external_access = false",
                "lock_configuration = true",
            ):
                connection.execute(f"SET {setting}")
            timer = threading.Timer(timeout_s, connection.interrupt) if timeout_s else None
            try:
                if timer:
                    timer.start()
                yield connection.table("completions"), list(columns)
            except duckdb.InterruptException:
                raise ValueError(f"the query was given up after {timeout_s:g} s") from None
            except duckdb.OutOfMemoryException:
                raise ValueError(
                    f"the query needs more than {MEMORY_LIMIT} of memory: ask for fewer steps or "
                    "columns"
                ) from None
            finally:
                if timer:
                    timer.cancel()


def _selects(
    connection: duckdb.DuckDBPyConnection, pieces: list[Path | pyarrow.Table]
) -> Iterator[str]:
    """SELECTs of all pieces, numbered in their order."""
    files = {number: str(piece) for number, piece in enumerate(pieces) if isinstance(piece, Path)}
    if files:
        yield (
            f"SELECT *, {list(files)}[file_index::BIGINT + 1] AS __part "
            f"FROM read_parquet({_list(files.values())}, union_by_name = true)"
        )
    for number, piece in enumerate(pieces):
        if number not in files:
            connection.register(f"piece_{number}", piece)
            yield f"SELECT *, {number} AS __part FROM piece_{number}"


def _list(texts: Iterable[str]) -> str:
    return f"[{', '.join(map(text_literal, texts))}]"


def read_id(completion_id: str) -> tuple[int, int, int]:
    """Step, group and place in the group of a completion.

    Raises:
        ValueError: it is not an id.
    """
    try:
        step, group_id, index = (int(word) for word in completion_id.split("-"))
    except ValueError:
        raise ValueError(
            f"{completion_id!r} is not an id of a completion, such as 12-340-0"
        ) from None
    return step, group_id, index


def _select_nothing(stored: list[str]) -> str:
    """No row, with the columns that all rows together have."""
    columns = [f"NULL::{STORED.get(name, 'JSON')} AS {quoted(name)}" for name in stored]
    return f"SELECT {', '.join(columns)}, 0 AS __row, 0 AS __part WHERE false"


def _filtered(completions: duckdb.DuckDBPyRelation, query: Query) -> duckdb.DuckDBPyRelation:
    """The completions that fit, whatever page of them is asked for."""
    if (query.limit is not None and query.limit < 0) or query.offset < 0:
        raise ValueError(f"limit {query.limit} and offset {query.offset} should be 0 or more")
    first, last = query.steps
    if first is not None:
        completions = completions.filter(f"step >= {int(first)}")
    if last is not None:
        completions = completions.filter(f"step <= {int(last)}")
    if query.grep:
        completions = completions.filter(f"contains(text, {text_literal(query.grep)})")
    if query.where and query.where.strip():
        # SQLExpression takes one expression and nothing that follows it.
        completions = completions.filter(duckdb.SQLExpression(query.where))
    if query.groups is not None:
        newest = (
            completions.aggregate("step, group_id, max(__part) AS __part, max(__row) AS __row")
            .order("__part DESC, __row DESC")
            .limit(query.groups)
            .project("step, group_id")
            .set_alias("newest")
        )
        completions = completions.join(newest, "step, group_id", how="semi")
    return completions


def _ordered(
    chosen: duckdb.DuckDBPyRelation, query: Query, columns: list[str]
) -> duckdb.DuckDBPyRelation:
    """Completions in the order of the answer."""
    by_place = ", ".join(PLACE)
    if query.sort is not None:
        way = "DESC" if query.descending else "ASC"
        return chosen.order(f"{quoted(_known(query.sort, columns))} {way} NULLS LAST, {by_place}")
    return chosen.order(_NEWEST_FIRST if query.descending and not query.latest else by_place)


def _cut(
    chosen: duckdb.DuckDBPyRelation, query: Query, columns: list[str]
) -> duckdb.DuckDBPyRelation:
    """Completions in order, without those before `offset` and after `limit`."""
    if query.limit is None and not query.offset:
        return _ordered(chosen, query, columns)
    limit = 2**62 if query.limit is None else query.limit
    if query.latest and query.limit is not None and query.sort is None:
        newest = chosen.order(_NEWEST_FIRST).limit(limit, query.offset)
        return _ordered(newest, query, columns)
    return _ordered(chosen, query, columns).limit(limit, query.offset)


def _page(
    completions: duckdb.DuckDBPyRelation,
    chosen: duckdb.DuckDBPyRelation,
    query: Query,
    columns: list[str],
) -> tuple[int, duckdb.DuckDBPyRelation]:
    """The number of chosen completions, and those of a page, in any order.

    First only their places are read: texts are most of the bytes, and only those of the page are
    needed.
    """
    by_sort = query.sort is not None or not query.latest
    ordered = _ordered(chosen, query, columns) if by_sort else chosen.order(_NEWEST_FIRST)
    places = ordered.project(", ".join(PLACE)).to_arrow_table()
    rows_of: dict[int, list[int]] = defaultdict(list)
    for place in places.slice(query.offset, query.limit).to_pylist():
        rows_of[place["__part"]].append(place["__row"])
    conditions = [
        f"(__part = {part} AND __row IN ({', '.join(map(str, rows))}))"
        for part, rows in rows_of.items()
    ]
    return places.num_rows, completions.filter(" OR ".join(conditions) or "false")


def _projected(
    chosen: duckdb.DuckDBPyRelation, query: Query, columns: list[str]
) -> duckdb.DuckDBPyRelation:
    wanted = query.columns
    if wanted is None:
        wanted = ["id", *STORED, *(n for n in columns if n not in STORED and n not in DERIVED)]
    return chosen.project(", ".join(quoted(_known(name, columns)) for name in wanted))


def _known(name: str, columns: list[str]) -> str:
    for column in columns:
        if column.lower() == name.lower():
            return column
    raise ValueError(f"{name!r} is not a column. {_listed(columns)}")


def _listed(columns: list[str]) -> str:
    return f"Columns are {', '.join(columns)}."


@contextmanager
def _explained(query: Query, columns: list[str]) -> Iterator[None]:
    """Turn DuckDB's errors about a condition into one that names the columns."""
    try:
        yield
    except (duckdb.InterruptException, duckdb.OutOfMemoryException):
        raise
    except duckdb.Error as error:
        if query.where is None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot search with {query.where!r}: {reason}. It should be one SQL condition, such "
            f"as reward > 0.5 and step >= 10. {_listed(columns)} Names with other characters stand "
            'in double quotes: "my reward" = 0.'
        ) from None


def _decoded(value: Any, kind: str) -> Any:
    return json.loads(value) if kind == "JSON" and value is not None else value
