"""The files of a torch_dist folder, checked before megatron-core unpickles them."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from rlsys.model.weight_files import RELEASE, TRACKER

COMMON = "common.pt"
"""What is not a tensor; megatron-core 0.16 unpickles it."""
_HARMLESS = {
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""What an index may name, beside classes of torch.distributed.checkpoint."""
_INDEX, _KIND = ".metadata", "metadata.json"


def is_mcore_folder(folder: Path) -> bool:
    """Whether this is a folder of Megatron-LM, or one of its iterations."""
    return (folder / TRACKER).is_file() or (folder / _KIND).is_file()


def mcore_weights(folder: Path) -> Path:
    """The folder of the weights, which the tracker file names.

    Raises:
        ValueError: it is not there, or not in the torch_dist format.
    """
    place = folder
    if (folder / TRACKER).is_file():
        word = (folder / TRACKER).read_text().strip()
        place = folder / (f"iter_{int(word):07d}" if word.isdigit() else RELEASE)
    if not (place / _KIND).is_file() or not (place / _INDEX).is_file():
        raise ValueError(
            f"{place} lacks {_KIND} or {_INDEX}: it is not a whole torch_dist folder. Copy it "
            "again, hidden files too"
        )
    return place


def check_mcore_files(folder: Path) -> None:
    """Refuse damaged files, and files that run code when they are read.

    Raises:
        ValueError: names the file; the text says what to do.
    """
    place = mcore_weights(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json, so `rlsys export` did not write it: convert it with "
            "the program that wrote it (`swift export --to_hf true`, or Megatron-Bridge)"
        )
    needed: dict[str, int] = {}
    for part in _index(place / _INDEX).storage_data.values():
        end = part.offset + part.length
        needed[part.relative_path] = max(end, needed.get(part.relative_path, 0))
    for name, size in needed.items():
        file = place / name
        if not file.is_file():
            raise ValueError(f"{place} lacks {name}, which its {_INDEX} names: copy it again")
        if file.stat().st_size < size:
            raise ValueError(
                f"{file} is cut off, it has {file.stat().st_size:,} bytes and by {_INDEX} at least "
                f"{size:,}: copy it again"
            )
    try:
        torch.load(place / COMMON, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{place / COMMON} is missing or damaged, or holds Python objects, which could run "
            "code. rlsys reads the folders that `rlsys export` wrote: convert others with the "
            "program that wrote them"
        ) from error


def check_index(place: Path) -> None:
    """Refuse the index of a torch_dist folder that would run code when torch unpickles it.

    Raises:
        ValueError: it is damaged, or names what no index needs.
    """
    if (place / _INDEX).is_file():
        _index(place / _INDEX)


def stored_numbers(folder: Path, *, without: tuple[str, ...]) -> Counter[torch.dtype]:
    """How many numbers of a folder's model are stored in each type.

    Args:
        without: last parts of the names of parameters that are not counted.
    """
    numbers: Counter[torch.dtype] = Counter()
    for key, entry in _index(mcore_weights(folder) / _INDEX).state_dict_metadata.items():
        is_of_model = hasattr(entry, "size") and not key.startswith("optimizer.")
        if is_of_model and key.rpartition(".")[2] not in without:
            numbers[entry.properties.dtype] += math.prod(entry.size)
    return numbers


def _index(file: Path) -> Any:
    try:
        with file.open("rb") as content:
            return _IndexUnpickler(content).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{file} is damaged, or is not torch's: {error}") from error


class _IndexUnpickler(pickle.Unpickler):
    """Reads torch's index of a distributed checkpoint, and makes no other objects."""

    def find_class(self, module: str, name: str) -> Any:
        """A class of torch.distributed.checkpoint, a size, a dtype or a layout."""
        if module.startswith("torch.distributed.checkpoint."):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__.startswith("torch.distributed."):
                return found
        elif (module, name) in _HARMLESS:
            return super().find_class(module, name)
        elif module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")
