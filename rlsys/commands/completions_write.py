"""Completions of `rlsys completions` for other programs."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow
from pyarrow import parquet

from rlsys.files import replacing
from rlsys.records.completions import Completions, Query

Format = Literal["json", "csv", "parquet"]


def write_completions(
    completions: Completions, query: Query, kind: Format, out: Path | None
) -> int:
    """Write the completions of a query to a file, which is whole or not there, or to the terminal.

    Returns:
        How many.

    Raises:
        ValueError: a wrong query, a file that cannot be written, or Parquet for a terminal.
    """
    if kind == "parquet" and out is None and sys.stdout.isatty():
        raise ValueError("--format parquet is not for terminals: add --out FILE, or redirect it")
    with completions.batches(query) as batches, _target(out) as target:
        return _WRITERS[kind](batches, target)


@contextmanager
def _target(out: Path | None) -> Iterator[IO[bytes]]:
    if out is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with replacing(out) as scratch, scratch.open("wb") as file:
            yield file
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None


def _write_json(batches: Iterable[pyarrow.RecordBatch], target: IO[bytes]) -> int:
    count = 0
    for row in _rows(batches):
        target.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        count += 1
    return count


def _write_csv(batches: Iterable[pyarrow.RecordBatch], target: IO[bytes]) -> int:
    text = io.TextIOWrapper(target, "utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    count = 0
    for row in _rows(batches):
        if not count:
            writer.writerow(row)
        writer.writerow(
            json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
            for value in row.values()
        )
        count += 1
    text.detach()
    return count


def _write_parquet(batches: pyarrow.RecordBatchReader, target: IO[bytes]) -> int:
    count = 0
    with parquet.ParquetWriter(target, batches.schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


_WRITERS = {"json": _write_json, "csv": _write_csv, "parquet": _write_parquet}


def _rows(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist(maps_as_pydicts="strict")
