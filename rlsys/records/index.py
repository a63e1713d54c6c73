"""Completions of JSONL files as Parquet: parsed once, by whoever reads them first.

Parsing JSON takes seconds for a gigabyte, and Parquet is filtered without reading its texts. So
pieces of the files are kept as Parquet in RUN/.cache; the newest rows stay in memory, until they
are many. The JSONL files are what counts: every piece says which bytes of which file it holds, and
one that does not fit the file any more is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import duckdb

from rlsys.files import decode_row, encode_row, replacing
from rlsys.records.columns import LACKING, PLACE, STORED, quoted, stored_columns, text_literal
from rlsys.rotation import open_parts
from rlsys.tracking.completions import row_problem

if TYPE_CHECKING:
    import pyarrow

FORMAT = 2
"""Version of the pieces; others are made again."""
PIECE_BYTES = 64 << 20
"""Bytes of JSON in a piece."""
QUIET_S, QUIET_BYTES = 600, 4 << 20
"""A file that nobody has written to for this long is kept as Parquet to its end, if that is not
parsed in an instant anyway."""
SAMPLES, SAMPLE_BYTES = 32, 128
"""What of a piece's bytes is compared with the file: an append-only file is the same where its
inode and these bytes are."""
_KEY = "rlsys"
_COUNT_BAD = """
SELECT count(*) FROM piece WHERE step IS NULL OR group_id IS NULL OR index IS NULL OR text IS NULL
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Contents:
    """What is known about the rows of one range of bytes."""

    rewards: list[str]
    """Names of reward functions."""
    further: dict[str, list[str]]
    """Column beside the known ones -> what json_type says about its values."""


@dataclass(slots=True)
class _Piece:
    start: int
    end: int
    contents: Contents
    rows: Path | pyarrow.Table
    """Parquet, or rows in memory."""


@dataclass(slots=True)
class _File:
    """One file, up to where it was read."""

    pieces: list[_Piece] = field(default_factory=list)
    digest: str = ""
    """Of samples of the bytes that were read."""

    @property
    def end(self) -> int:
        return self.pieces[-1].end if self.pieces else 0


class CompletionIndex:
    """Follows one kind of completions of a run.

    Args:
        path: the newest file; its older parts lie beside it.
        cache: folder for Parquet; where it cannot be written, rows stay in memory.
    """

    def __init__(self, path: Path, cache: Path):
        self._path, self._cache = path, cache
        self._stores = True
        """False after the cache could not be written."""
        self._files: dict[int, _File] = {}
        """Inode -> file."""
        self._lock = threading.Lock()

    def pieces(self) -> tuple[list[Path | pyarrow.Table], Contents]:
        """All rows so far, in the order in which they were recorded, and what they hold."""
        with self._lock, ExitStack() as stack:
            files, self._files = self._files, {}
            for path, file in open_parts(self._path, stack):
                inode = os.fstat(file.fileno()).st_ino
                known = files.get(inode)
                if known is None or not _is_same(file, known):
                    known = self._stored(file)
                self._read(known, path, file)
                self._files[inode] = known
            self._remove_unused()
            pieces = [piece for known in self._files.values() for piece in known.pieces]
            return [piece.rows for piece in pieces], _together([piece.contents for piece in pieces])

    def _read(self, known: _File, path: Path, file: IO[bytes]) -> None:
        """Read what was appended since the last time."""
        status = os.fstat(file.fileno())
        stop = _end_of_lines(file, known.end, status.st_size)
        is_quiet = time.time() - status.st_mtime > QUIET_S and status.st_size > QUIET_BYTES
        is_done = path != self._path or is_quiet
        stored = [piece for piece in known.pieces if isinstance(piece.rows, Path)]
        in_memory = stop - (stored[-1].end if stored else 0)
        if in_memory and self._stores and (is_done or in_memory > PIECE_BYTES):
            known.pieces = stored  # the others become Parquet below
        while known.end < stop:
            end = _end_of_lines(file, known.end, min(stop, known.end + PIECE_BYTES))
            if end == known.end:  # a line that is longer than a piece
                end = stop
            known.pieces.append(self._piece(path, file, known.end, end, keep=is_done or end < stop))
        known.digest = _digest(file, 0, known.end)

    def _piece(self, path: Path, file: IO[bytes], start: int, end: int, *, keep: bool) -> _Piece:
        with duckdb.connect() as connection, _copied(file, start, end) as copy:
            contents = _load(connection, copy, path)
            if keep and self._stores:
                target = self._cache / f"{self._path.stem}.{_inode(file)}.{start}.{end}.parquet"
                try:
                    self._cache.mkdir(mode=0o700, exist_ok=True)
                    _store(connection, contents, target, file, start, end)
                    return _Piece(start, end, contents, target)
                except (OSError, duckdb.IOException) as error:
                    self._stores = False
                    logger.warning("%s: not kept as Parquet: %s", path, error)
            return _Piece(start, end, contents, connection.table("piece").to_arrow_table())

    def _stored(self, file: IO[bytes]) -> _File:
        """The pieces of a file that an earlier process has made, as far as they still fit."""
        known = _File()
        found = {}
        for path in self._cache.glob(f"{self._path.stem}.{_inode(file)}.*.parquet"):
            start, end = (int(word) for word in path.name.split(".")[-3:-1])
            found[start] = (end, path)
        while (next_piece := found.get(known.end)) is not None:
            start, (end, path) = known.end, next_piece
            contents = _stored_contents(path, file, start, end)
            if contents is None or end <= start:
                break
            known.pieces.append(_Piece(start, end, contents, path))
        return known

    def _remove_unused(self) -> None:
        used = {
            piece.rows
            for known in self._files.values()
            for piece in known.pieces
            if isinstance(piece.rows, Path)
        }
        for path in self._cache.glob(f"{self._path.stem}.*.parquet"):
            if path not in used:
                with suppress(OSError):
                    path.unlink()


def _inode(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_ino


def _is_same(file: IO[bytes], known: _File) -> bool:
    return (
        os.fstat(file.fileno()).st_size >= known.end and _digest(file, 0, known.end) == known.digest
    )


def _digest(file: IO[bytes], start: int, end: int) -> str:
    """A digest of bytes that are spread over a range, its first and last ones too."""
    digest = hashlib.blake2b(digest_size=16)
    last = max(start, end - SAMPLE_BYTES)
    for number in range(SAMPLES):
        place = start + (last - start) * number // (SAMPLES - 1)
        digest.update(os.pread(file.fileno(), min(SAMPLE_BYTES, end - place), place))
    return digest.hexdigest()


def _end_of_lines(file: IO[bytes], start: int, stop: int) -> int:
    """The end of the last whole line in a range; its start if it holds none."""
    block = 1 << 16
    while stop > start:
        begin = max(start, stop - block)
        newline = os.pread(file.fileno(), stop - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        stop = begin
    return start


@contextmanager
def _copied(file: IO[bytes], start: int, end: int) -> Iterator[Path]:
    """A file of these bytes alone, which nobody appends to or renames."""
    with tempfile.TemporaryDirectory(prefix="rlsys-") as folder:
        copy = Path(folder) / "rows.jsonl"
        with copy.open("wb") as target:
            for place in range(start, end, 1 << 20):
                target.write(os.pread(file.fileno(), min(1 << 20, end - place), place))
        yield copy


def _load(connection: duckdb.DuckDBPyConnection, copy: Path, path: Path) -> Contents:
    """Make the table `piece` of the rows of a file.

    Args:
        connection: gets the table.
        copy: the rows as JSON lines.
        path: the file that messages name.
    """
    further = _further_columns(copy)
    while True:
        _make_table(connection, copy, further)
        bad = connection.execute(_COUNT_BAD).fetchone()
        assert bad is not None
        if bad[0]:
            _mend(copy, path)
            _make_table(connection, copy, further)
        named = connection.execute("SELECT DISTINCT unnest(extra_columns) FROM piece").fetchall()
        wanted = _distinct([*further, *(name for (name,) in named if name is not None)])
        if wanted == further:
            break
        further = wanted
    rewards = connection.execute("SELECT DISTINCT unnest(map_keys(rewards)) FROM piece").fetchall()
    kinds = {
        name: connection.execute(f"SELECT DISTINCT json_type({quoted(name)}) FROM piece").fetchall()
        for name in sorted(further)
    }
    return Contents(
        sorted(name for (name,) in rewards),
        {name: sorted(kind for (kind,) in found if kind) for name, found in kinds.items()},
    )


def _make_table(connection: duckdb.DuckDBPyConnection, copy: Path, further: set[str]) -> None:
    columns = [
        f"coalesce({quoted(name)}, {LACKING[name]}) AS {quoted(name)}"
        if name in LACKING
        else quoted(name)
        for name in (*STORED, *sorted(further))
    ]
    connection.execute(
        f"CREATE OR REPLACE TABLE piece AS SELECT {', '.join(columns)},"
        " row_number() OVER () AS __row"
        f" FROM read_json({text_literal(str(copy))}, columns={stored_columns(sorted(further))},"
        f" format='newline_delimited', ignore_errors=true, maximum_object_size={PIECE_BYTES})"
    )


def _further_columns(copy: Path) -> set[str]:
    """Columns beside the known ones in the first rows."""
    names: set[str] = set()
    with copy.open("rb") as file:
        for _ in range(100):
            row = decode_row(file.readline())
            if row is not None:
                names |= row.keys()
    return _distinct(names)


def _distinct(names: Iterable[str]) -> set[str]:
    """Names beside the known ones that SQL tells apart; of "a" and "A" it is the first."""
    taken = {name.lower() for name in (*STORED, *PLACE)}
    found = {name.lower(): name for name in sorted(names, reverse=True)}
    return {name for lower, name in found.items() if lower not in taken}


def _mend(copy: Path, path: Path) -> None:
    """Drop lines that are not rows, and write half surrogates, which DuckDB refuses, as texts."""
    problems = []
    with replacing(copy) as scratch, copy.open("rb") as source, scratch.open("wb") as target:
        for line in source:
            row = decode_row(line)
            problem = "it is not a JSON object" if row is None else row_problem(row)
            if row is None or problem is not None:
                problems.append(problem)
            else:
                target.write(encode_row(_without_surrogates(row)))
    if problems:
        logger.warning("%s: skipped lines (%d), the first: %s", path, len(problems), problems[0])


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def _store(
    connection: duckdb.DuckDBPyConnection,
    contents: Contents,
    target: Path,
    file: IO[bytes],
    start: int,
    end: int,
) -> None:
    status = os.fstat(file.fileno())
    about = {
        "format": FORMAT,
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "digest": _digest(file, start, end),
        "rewards": contents.rewards,
        "further": contents.further,
    }
    with replacing(target) as scratch:
        connection.execute(
            f"COPY piece TO {text_literal(str(scratch))} (FORMAT parquet, COMPRESSION zstd, "
            f"KV_METADATA {{{_KEY}: {text_literal(json.dumps(about))}}})"
        )


def _stored_contents(path: Path, file: IO[bytes], start: int, end: int) -> Contents | None:
    """What a piece on disk holds; None if it does not fit the file."""
    status = os.fstat(file.fileno())
    try:
        found = duckdb.execute(
            "SELECT value FROM parquet_kv_metadata(?) WHERE key = ?", [str(path), _KEY.encode()]
        ).fetchone()
        about = json.loads(found[0]) if found else {}
        in_place = about["size"] == status.st_size and about["modified"] != status.st_mtime_ns
        if about["format"] != FORMAT or in_place or status.st_size < end:
            return None
        if about["digest"] != _digest(file, start, end):
            return None
        return Contents(about["rewards"], about["further"])
    except (OSError, duckdb.Error, ValueError, KeyError):
        return None


def _together(all_contents: list[Contents]) -> Contents:
    rewards: dict[str, None] = {}
    further: dict[str, set[str]] = {}
    for contents in all_contents:
        rewards |= dict.fromkeys(contents.rewards)
        for name, kinds in contents.further.items():
            further.setdefault(name, set()).update(kinds)
    return Contents(list(rewards), {name: sorted(kinds) for name, kinds in further.items()})
