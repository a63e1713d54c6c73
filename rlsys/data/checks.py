"""What is wrong with the data of a config, as far as a second's look at the first rows tells.

`rlsys.data.load` checks every row when the run starts.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlsys.config import DataConfig
from rlsys.data.sources import Problems, Source, Split, open_sources
from rlsys.data.spec import parse_spec
from rlsys.data.tables import OWN_SUFFIXES
from rlsys.rewards import plugin_problems

FIRST_ROWS = 20
"""Rows of each text file that are looked at."""
_SHOWN = 3
_COUNTABLE_BYTES = 200 * 2**20
"""Count the rows of JSONL files up to this size; larger ones would take a while to read."""

Finding = tuple[str, bool]
"""What is wrong, and whether only on this machine (a file is missing, say)."""


def check_data(config: DataConfig) -> Iterator[Finding]:
    """Problems of plugins, dataset entries, files and their first rows."""
    not_loaded = list(plugin_problems("data.external_plugins", config.external_plugins))
    yield from not_loaded
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        field = "data.dataset" if split == "train" else "data.val_dataset"
        described = Problems()
        sources = open_sources(config, split, described)
        for text in described.texts:
            hint = " (a plugin above could not be loaded)" if not_loaded else ""
            yield f"{field}: {text}{hint}", bool(not_loaded)
        for source in sources:
            for text, only_here in _check_source(source):
                yield f"{field}: {text}", only_here


def count_rows(config: DataConfig) -> int | None:
    """Training rows, before the length limit; None where counting would not be cheap."""
    total = 0
    for text in config.dataset:
        try:
            spec = parse_spec(text)
        except ValueError:
            return None
        if spec.num_rows is not None and not config.streaming:
            total += spec.num_rows
            continue
        path = spec.path
        if path.suffix != ".jsonl" or not path.is_file() or path.stat().st_size > _COUNTABLE_BYTES:
            return None
        with path.open("rb") as file:
            rows = sum(1 for line in file if line.strip())
        total += min(rows, spec.num_rows or rows)
    return round(total * (1 - config.split_dataset_ratio))


def _check_source(source: Source) -> Iterator[Finding]:
    problem = source.file_problem()
    path = source.spec.path
    if problem is not None:
        yield problem, not path.exists()
    elif source.spec.is_local and path.suffix in OWN_SUFFIXES and path.is_file():
        yield from _check_first_rows(source)
    elif source.spec.is_local and path.suffix == ".parquet" and path.is_file():
        yield from _check_parquet(source)


def _check_first_rows(source: Source) -> Iterator[Finding]:
    _, bad = source.first_rows(FIRST_ROWS)
    for text in bad[:_SHOWN]:
        yield text, False
    if len(bad) > _SHOWN:
        yield (
            f"{source.spec.name}: {len(bad) - _SHOWN} more of the first rows cannot be used",
            False,
        )


def _check_parquet(source: Source) -> Iterator[Finding]:
    """Only the names of the columns: rows would need `datasets`, which takes a second to import."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(source.spec.path).names
    except (pyarrow.ArrowException, OSError) as error:
        yield f"{source.spec.path} is not a Parquet file: {error}", False
        return
    source.columns.update(dict.fromkeys(names))
    problem = source.problem_of_all_rows()
    if problem is not None:
        yield problem, False
