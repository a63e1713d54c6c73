"""An entry of `data.dataset`: a file, a folder or a hub dataset, and which part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".ndjson")
"""Suffixes of files that rlsys reads itself, without `datasets`."""
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes that may follow one of `TEXT_SUFFIXES`."""
Hub = Literal["hf", "modelscope"]
_HUBS: dict[str, Hub] = {"hf": "hf", "ms": "modelscope"}
"""ms-swift's prefixes of ids, `hf::owner/name` -> the hub."""
_MODELSCOPE_PREFIX = "ms::"


def split_hub(name: str) -> tuple[Hub | None, str]:
    """The hub that the prefix of a model or dataset names, None without one, and the bare name."""
    prefix, colons, rest = name.partition("::")
    hub = _HUBS.get(prefix.lower()) if colons else None
    return (None, name) if hub is None else (hub, rest)


def file_kind(path: Path) -> str:
    """One of `FILE_SUFFIXES`, without the suffix of compression; empty for any other file."""
    if path.suffix in COMPRESSED_SUFFIXES:
        kind = Path(path.stem).suffix
        return kind if kind in TEXT_SUFFIXES else ""
    return path.suffix if path.suffix in FILE_SUFFIXES else ""


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One dataset of a config, in ms-swift's syntax plus a split.

    `[hf::|ms::]PATH_OR_ID[:SUBSET[/SUBSET...][:SPLIT]][#ROWS]`

    Example:
        parse_spec("data/train.jsonl#1000")      # 1,000 rows of a file
        parse_spec("openai/gsm8k:main#500")      # a subset (config name) of a hub dataset
        parse_spec("openai/gsm8k:main:test")     # another split than the default
        parse_spec("hf::owner/name::test")       # no subset
        parse_spec("ms::owner/name")             # of ModelScope
    """

    text: str
    """The entry of the config."""
    name: str
    """A path, or an id of the hub."""
    subsets: tuple[str, ...] = ()
    """Config names of a hub dataset or a folder laid out like one; empty takes the only one."""
    split: str | None = None
    """None is train for training, and the first of validation, test, train for evaluation."""
    num_rows: int | None = None
    """The number of rows to take; None takes all."""
    from_hub: bool = False
    """Whether `hf::` or `ms::` says that `name` is not a path."""
    from_modelscope: bool = False
    """Whether that hub is ModelScope."""

    @property
    def path(self) -> Path:
        """The path of `name` on this machine, whether it exists or not."""
        return Path(self.name)

    @property
    def is_local(self) -> bool:
        """Whether it is a path, or cannot be an id of the hub."""
        if self.from_hub:
            return False
        return self.path.exists() or _looks_local(self.name)

    @property
    def same_rows(self) -> tuple[str, tuple[str, ...], str | None, bool]:
        """Equal for two specs that read the same rows."""
        return self.name, self.subsets, self.split, self.from_modelscope

    @property
    def long_name(self) -> str:
        """The name with subsets and split."""
        return ":".join(filter(None, (self.name, "/".join(self.subsets), self.split)))

    @property
    def stem(self) -> str:
        """The short name that prompt ids start with."""
        if not self.is_local:
            return self.name.rsplit("/", 1)[-1]
        path = Path(self.name)
        return Path(path.stem).stem if path.suffix in COMPRESSED_SUFFIXES else path.stem


def parse_spec(text: str) -> DatasetSpec:
    """Read an entry of `data.dataset`. The name of an existing file or folder is always a path.

    Raises:
        ValueError: an unknown prefix, or something else than a row count behind `#`.
    """
    if not text.strip():
        raise ValueError("a dataset is empty: give a path or an id of the hub")
    if _exists(text):
        return DatasetSpec(text, text)
    hub, rest = split_hub(text)
    from_hub = hub is not None
    name, num_rows = _row_count(rest, text)
    is_folder = ":" in name and _exists(name.partition(":")[0])
    if not from_hub and (_exists(name) or (_looks_local(name) and not is_folder)):
        return DatasetSpec(text, name, num_rows=num_rows)
    name, _, part = name.partition(":")
    subsets, _, split = part.partition(":")
    return DatasetSpec(
        text,
        name,
        tuple(subset for subset in subsets.split("/") if subset),
        split or None,
        num_rows,
        from_hub,
        hub == "modelscope",
    )


def _row_count(rest: str, text: str) -> tuple[str, int | None]:
    name, hash_sign, count = rest.rpartition("#")
    if not hash_sign:
        return rest, None
    if not count.isdecimal() or not int(count):
        raise ValueError(
            f"dataset {text!r}: a number of rows belongs behind #, as in {name}#1000, not {count!r}"
        )
    return name, int(count)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a path, a null byte
        return False


def is_local_path(name: str) -> bool:
    """Whether `name` can only be a path, as ids of the hub look like `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _looks_local(name: str) -> bool:
    """Whether `name`, which does not exist as a path, cannot be a dataset of the hub either."""
    bare = name.partition(":")[0]  # behind it a subset or a split, with slashes of their own
    return is_local_path(bare) or bool(file_kind(Path(bare)))


def model_of_modelscope(name: str) -> str:
    """A model's id with the prefix of ModelScope; paths, and ids with a prefix, stay."""
    here = is_local_path(name) or Path(name).expanduser().is_dir()
    return name if here or split_hub(name)[0] else _MODELSCOPE_PREFIX + name


def dataset_of_modelscope(text: str) -> str:
    """The same for an entry of data.dataset; a malformed one stays, and is reported later."""
    try:
        spec = parse_spec(text)
    except ValueError:
        return text
    return text if spec.is_local or spec.from_hub else _MODELSCOPE_PREFIX + text
