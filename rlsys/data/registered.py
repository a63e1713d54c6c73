"""Datasets that a plugin registers, as ms-swift's do: a name, where the rows are, a preprocessor.

    register_dataset(DatasetMeta(hf_dataset_id="owner/name", preprocess_func=MyPreprocessor()))

An entry of `data.dataset` may be one of the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlsys.config.dataset_spec import DatasetSpec
from rlsys.data.row_preprocessors import AutoPreprocessor, RowPreprocessor


@dataclass
class SubsetDataset:
    """A subset (config name) of a dataset of the hub."""

    name: str | None = None
    """The name in an entry of `data.dataset`; None is the same as `subset`."""
    subset: str = "default"
    """The name on the hub."""
    split: list[str] | None = None
    """None takes the dataset's."""
    preprocess_func: Any = None
    """None takes the dataset's."""
    is_weak_subset: bool = False
    """Whether `NAME:all` leaves it out."""

    def __post_init__(self) -> None:
        self.name = self.name or self.subset


@dataclass
class DatasetMeta:
    """A dataset by name; `tags`, `help`, `huge_dataset` and `ms_revision` have no effect."""

    ms_dataset_id: str | None = None
    """ModelScope's id, which is read with hub: modelscope, or without the other two."""
    hf_dataset_id: str | None = None
    dataset_path: str | None = None
    """A file or a folder; relative paths start at the working directory."""
    dataset_name: str | None = None
    """One more name."""
    ms_revision: str | None = None
    hf_revision: str | None = None
    subsets: Sequence[SubsetDataset | str] = ("default",)
    split: Sequence[str] = ("train",)
    preprocess_func: Any = field(default_factory=AutoPreprocessor)
    """A `RowPreprocessor`: a class or an instance."""
    loader: Any = None
    tags: Sequence[str] = ()
    help: str | None = None
    huge_dataset: bool = False

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError(
                "DatasetMeta has no name: give it hf_dataset_id, dataset_path or dataset_name"
            )
        for what, value in (("loader", self.loader), ("hf_revision", self.hf_revision)):
            if value is not None:
                raise ValueError(
                    f"DatasetMeta of {self.names[0]!r}: {what} = {value!r:.80} is not supported. "
                    "Write the rows into a file, and name that as dataset_path"
                )

    @property
    def names(self) -> list[str]:
        """The names that an entry of `data.dataset` may use, the best one first."""
        given = (self.dataset_name, self.hf_dataset_id, self.ms_dataset_id, self.dataset_path)
        return [name for name in given if name]


registered_datasets: list[DatasetMeta] = []


def register_dataset(
    dataset_meta: DatasetMeta, *, exist_ok: bool = False, **unsupported: Any
) -> None:
    """Register a dataset under all its names.

    Raises:
        ValueError: another dataset has one of the names, and `exist_ok` is not set.
    """
    if unsupported or not isinstance(dataset_meta, DatasetMeta):
        raise ValueError(
            "register_dataset takes a DatasetMeta (from rlsys.data import DatasetMeta) and "
            f"exist_ok, not {', '.join(unsupported) or type(dataset_meta).__name__}"
        )
    for other in [meta for meta in registered_datasets if set(meta.names) & {*dataset_meta.names}]:
        if not exist_ok:
            both = next(name for name in other.names if name in dataset_meta.names)
            raise ValueError(
                f"the dataset {both!r} is registered twice: leave one out, or set exist_ok=True"
            )
        registered_datasets.remove(other)
    registered_datasets.append(dataset_meta)


def find_registered(name: str) -> DatasetMeta | None:
    """The registered dataset with this name, or with a clone in the folder `name`."""
    for meta in registered_datasets:
        if name in meta.names:
            return meta
    for meta in registered_datasets:
        path = _path(name)
        ids = {str(known).rpartition("/")[2] for known in (meta.hf_dataset_id, meta.ms_dataset_id)}
        is_its_path = bool(meta.dataset_path) and path == _path(str(meta.dataset_path))
        if path.exists() and (is_its_path or (path.is_dir() and path.name in ids)):
            return meta
    return None


def resolve(spec: DatasetSpec, meta: DatasetMeta) -> tuple[DatasetSpec, Any]:
    """Where the rows of a registered dataset are, and its preprocessor.

    Raises:
        ValueError: its dataset_path does not exist, or the subset or split is ambiguous.
    """
    prepare = meta.preprocess_func
    if not isinstance(prepare, RowPreprocessor) and not (
        isinstance(prepare, type) and issubclass(prepare, RowPreprocessor)
    ):
        raise ValueError(
            f"dataset {spec.text!r}: its preprocess_func is {prepare!r:.80}. ms-swift calls such a "
            "function with the whole dataset, rlsys does not: derive a class from RowPreprocessor "
            "(from rlsys.data import RowPreprocessor) whose preprocess(row) returns a row"
        )
    name, from_modelscope = _place(spec, meta)
    if Path(name).expanduser().is_file():
        return replace(spec, name=str(Path(name).expanduser())), prepare
    subsets = _subsets(spec, meta)
    listed = [name for subset in subsets for name in subset.split or meta.split]
    splits = list(dict.fromkeys(listed or meta.split))
    if spec.split is None and len(splits) != 1:
        raise ValueError(
            f"dataset {spec.text!r} is registered with several splits: list one entry for each, as "
            f"{meta.names[0]}:{'/'.join(spec.subsets)}:SPLIT with SPLIT one of {'/'.join(splits)}"
        )
    functions = [subset.preprocess_func for subset in subsets if subset.preprocess_func is not None]
    if functions and len(subsets) > 1:
        raise ValueError(
            f"dataset {spec.text!r} has subsets with a preprocess_func of their own: list one "
            f"entry for each, as {meta.names[0]}:{subsets[0].name}"
        )
    split = spec.split or splits[0]
    found = replace(
        spec,
        name=name,
        subsets=tuple(subset.subset for subset in subsets if subset.subset != "default"),
        # "train" is the default, and lets evaluation look for validation and test.
        split=spec.split or (None if split == "train" else split),
        from_hub=spec.from_hub or from_modelscope or not Path(name).expanduser().exists(),
        from_modelscope=from_modelscope,
    )
    return found, functions[0] if functions else prepare


def _place(spec: DatasetSpec, meta: DatasetMeta) -> tuple[str, bool]:
    """The path or hub id of the rows, and whether that hub is ModelScope."""
    if spec.is_local and spec.path.exists():
        return spec.name, False
    if meta.dataset_path and not spec.from_hub:
        if not _path(meta.dataset_path).exists():
            raise ValueError(
                f"dataset {spec.text!r}: its dataset_path {meta.dataset_path!r} does not exist "
                f"(looked for {_path(meta.dataset_path)}). Relative paths start at the working "
                "directory."
            )
        return meta.dataset_path, False
    ids = {True: meta.ms_dataset_id, False: meta.hf_dataset_id}
    from_modelscope = spec.from_modelscope if spec.from_hub else not meta.hf_dataset_id
    return ids[from_modelscope] or spec.name, from_modelscope


def _subsets(spec: DatasetSpec, meta: DatasetMeta) -> list[SubsetDataset]:
    listed = [SubsetDataset(subset=s) if isinstance(s, str) else s for s in meta.subsets]
    known = {subset.name: subset for subset in listed}
    if spec.subsets == ("all",) and "all" not in known:
        return [subset for subset in listed if not subset.is_weak_subset]
    if spec.subsets:
        return [known.get(name, SubsetDataset(subset=name)) for name in spec.subsets]
    if len(listed) <= 1 or "default" in known:
        return listed if len(listed) <= 1 else [known["default"]]
    raise ValueError(
        f"dataset {spec.text!r} is registered with the subsets {', '.join(map(str, known))}: name "
        f"some, as {meta.names[0]}:{next(iter(known))}, or {meta.names[0]}:all"
    )


def _path(text: str) -> Path:
    return Path(text).expanduser().resolve()
