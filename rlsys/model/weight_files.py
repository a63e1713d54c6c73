"""The weight files of a model folder and their headers, read without torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.model.folder import read_json, refuse_lfs_pointer

INDEX = "model.safetensors.index.json"
ROLLOUTS_FILE = "rollouts.json"
"""In a checkpoint of GRPO: the place in the data."""
DATA_FILE = "data.json"
"""The same in one of supervised training."""
MANIFEST_FILE = "manifest.json"
"""In a checkpoint: its files, with sizes and checksums."""
RUN_CONFIG_FILE = "run_config.yaml"
"""In a checkpoint: the config of the run that wrote it."""
TRACKER = "latest_checkpointed_iteration.txt"
"""In a folder of Megatron-LM: names the folder below that holds the weights."""
RELEASE = "release"
"""The folder of the weights in it, where they are not an iteration of Megatron-LM's own."""
UNTRAINED_FILE = "untrained.safetensors"
"""In RELEASE: what megatron-core's model does not have, layers that predict further tokens."""
OF_THE_RUN = (
    ROLLOUTS_FILE,
    DATA_FILE,
    MANIFEST_FILE,
    RUN_CONFIG_FILE,
    "trainer_state.json",
    TRACKER,
)
"""Files that rlsys, transformers' Trainer and Megatron-LM write beside a model."""
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, as its header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte of its data in the file."""
    end: int


def indexed_names(folder: Path) -> set[str] | None:
    """The names of the weight files in the folder's index; None without an index.

    Raises:
        ValueError: the index cannot be read.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    values = read_json(index)
    files = values.get("weight_map")
    if not isinstance(files, dict) or not all(map(_is_name, files.values())):
        raise ValueError(f"{index} is not a JSON object with weight_map: download it again")
    return set(files.values())


def _is_name(value: Any) -> bool:
    """Whether it is the name of a file beside the index, and not a path to another place."""
    return isinstance(value, str) and value == Path(value).name and 0 < len(value) < 256


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those in its index, or all without one."""
    names = indexed_names(folder)
    if names is None:
        return sorted(folder.glob("*.safetensors"))
    return [folder / name for name in sorted(names) if os.path.isfile(folder / name)]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        ValueError: the file is something else, or incomplete; the text says what to do.
    """
    refuse_lfs_pointer(file)
    other = (
        f"{file} is not a safetensors file: download it again, or save the model with "
        "`save_pretrained`"
    )
    with file.open("rb") as content:
        start = content.read(_LENGTH_BYTES)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < _LENGTH_BYTES or header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(other)
        text = content.read(header_bytes)
    first = _LENGTH_BYTES + header_bytes
    tensors = {}
    if len(text) == header_bytes:
        try:
            for name, entry in json.loads(text).items():
                if name != "__metadata__":
                    begin, end = map(int, entry["data_offsets"])
                    tensors[name] = StoredTensor(
                        file, entry["dtype"], tuple(entry["shape"]), first + begin, first + end
                    )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ValueError(other) from None
    needed = max((tensor.end for tensor in tensors.values()), default=first)
    size = file.stat().st_size
    if size < needed:
        raise ValueError(
            f"{file} is cut off, it has {size:,} bytes and by its header at least {needed:,}: "
            "download it again"
        )
    return tensors
