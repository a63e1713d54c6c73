"""Rows through the `datasets` library: Parquet, Arrow, folders, and the Hugging Face hub."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config.dataset_spec import TEXT_SUFFIXES, DatasetSpec, file_kind
from rlsys.data.row import Row
from rlsys.data.text_files import read_file
from rlsys.model.modelscope import download

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_EVALUATION_SPLITS = ("validation", "test", "train")
_BATCH = 1000


def read_table(path: Path, *, streaming: bool) -> Iterator[Row]:
    """The rows of a Parquet or Arrow file.

    Raises:
        ValueError: it is not one.
    """
    import datasets
    import pyarrow

    kind = path.suffix[1:]
    try:
        with _quiet():
            table = datasets.load_dataset(
                kind, data_files=str(path), split="train", streaming=streaming
            )
        yield from _rows(str(path), table)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{path} is not {'a Parquet' if kind == 'parquet' else 'an Arrow'} file: "
            f"{error.__cause__ or error}"
        ) from error


def read_hub(
    spec: DatasetSpec, *, evaluation: bool, streaming: bool, max_row_mb: int
) -> Iterator[Row]:
    """The rows of a dataset of a hub, or of a folder laid out like one.

    Raises:
        ValueError: it cannot be loaded, or does not have such a subset or split.
    """
    if spec.from_modelscope:
        try:
            folder = download(spec.name, "dataset")
        except ValueError as error:
            raise ValueError(f"dataset {spec.text!r}: {error}") from None
        spec = replace(spec, name=str(folder), from_hub=False, from_modelscope=False)
    if _is_saved(spec.path):
        yield from _rows(spec.text, _chosen(spec, _load_saved(spec), evaluation))
        return
    number = 0
    for subset in spec.subsets or (None,):
        for row in _subset(spec, subset, evaluation, streaming, max_row_mb):
            number += 1
            row.number = number
            row.location += "" if subset is None else f" of {subset}"
            yield row


def _subset(
    spec: DatasetSpec, subset: str | None, evaluation: bool, streaming: bool, max_row_mb: int
) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    name = str(spec.path) if spec.is_local else spec.name
    try:
        with _quiet():
            builder = datasets.load_dataset_builder(name, name=subset)
            files = _own_files(builder) if spec.is_local else None
            splits = None if files else datasets.load_dataset(name, subset, streaming=streaming)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        what = "the folder" if spec.is_local else "no file here, and the Hugging Face hub's dataset"
        raise ValueError(
            f"dataset {spec.text!r}: {what} could not be loaded: {_first_lines(error)}"
        ) from error
    if not files:
        yield from _rows(spec.text, _chosen(spec, splits, evaluation))
        return
    for path in _chosen(spec, files, evaluation):
        for row in read_file(path, max_row_mb=max_row_mb):
            row.location = f"{os.path.relpath(path, spec.path.resolve())}, {row.location}"
            yield row


def _own_files(builder: Any) -> dict[str, list[Path]] | None:
    """The files of each split if rlsys reads all of them itself, else None."""
    found = builder.config.data_files or {}
    files = {str(split): [Path(str(file)) for file in listed] for split, listed in found.items()}
    every = [file for listed in files.values() for file in listed]
    return files if every and all(file_kind(file) in TEXT_SUFFIXES for file in every) else None


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved(spec: DatasetSpec) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(spec.path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset {spec.text!r}: the saved dataset could not be loaded: {_first_lines(error)}"
        ) from error
    return saved if isinstance(saved, dict) else {spec.split or "train": saved}


def _chosen(spec: DatasetSpec, splits: Any, evaluation: bool) -> Any:
    wanted = (spec.split,) if spec.split else _EVALUATION_SPLITS if evaluation else ("train",)
    for name in wanted:
        if name in splits:
            return splits[name]
    raise ValueError(
        f"dataset {spec.text!r} has no split {wanted[0]!r}, only {', '.join(splits)}: name one as "
        f"{spec.name}:{'/'.join(spec.subsets)}:{next(iter(splits))}"
    )


def _rows(source: str, table: Dataset | IterableDataset) -> Iterator[Row]:
    import datasets

    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            raise ValueError(
                f"dataset {source!r} has {type(feature).__name__.lower()} data in the column "
                f"{name!r}. rlsys trains on text alone: take a dataset without, or remove the "
                "column if prompts make sense without it"
            )
    number = 0
    for batch in table.iter(batch_size=_BATCH):
        for values in zip(*batch.values(), strict=True):
            number += 1
            columns = dict(zip(batch, values, strict=True))
            yield Row(number, f"row {number}", without_fill(columns, table.features))


def without_fill(columns: dict[str, Any], features: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row of a table without the nulls that the table put into its structs.

    Structs of a table have the fields of all rows, at every depth, and null where a row does not
    have one. A null that was in the row looks the same, and goes too. A feature of type Json stays
    unchanged. NaN, with which pandas and numpy mark a missing value, is a null.
    """
    import datasets

    def clean(value: Any, feature: Any) -> Any:
        if isinstance(feature, datasets.Json):
            return value
        if isinstance(value, dict):
            features_of_keys = feature if isinstance(feature, dict) else {}
            return {
                k: clean(v, features_of_keys.get(k)) for k, v in value.items() if not _is_missing(v)
            }
        if isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
            return [clean(entry, getattr(feature, "feature", None)) for entry in value]
        return None if _is_missing(value) else value

    return {name: clean(value, (features or {}).get(name)) for name, value in columns.items()}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _first_lines(error: BaseException) -> str:
    return "\n".join(str(error.__cause__ or error).strip().splitlines()[:3])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Run without the progress bars of `datasets`, which fill logs."""
    import datasets

    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
