"""The model of a LoRA adapter for `rlsys infer` and `rlsys eval`: merged once, into a cache."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from rlsys.commands.export_formats import read_dtypes
from rlsys.engines.megatron.merge import save_merged_folder
from rlsys.files import bytes_in, free_bytes, size_text
from rlsys.model.adapter_folder import CONFIG_FILE
from rlsys.model.shape import read_model_shape
from rlsys.model.stored_adapter import StoredAdapter
from rlsys.model.weight_files import weight_files
from rlsys.run.model_source import ModelSource


def with_merged_adapter(source: ModelSource) -> ModelSource:
    """`source` with a folder that vLLM can load: of an adapter, its base with it merged in.

    Raises:
        ValueError: the adapter is for another model, or the disk is full.
    """
    if source.adapter is None:
        return source
    folder = _cache() / f"{source.saved.resolve().name}-{_fingerprint(source)}"
    if not folder.is_dir():
        _write(source.folder, source.adapter, folder)
        print(
            f"merged {source.label} into {folder}, {size_text(bytes_in(folder))}: later commands "
            "use it, and it can be deleted",
            file=sys.stderr,
            flush=True,
        )
    return replace(source, folder=folder)


def _write(base: Path, adapter: StoredAdapter, folder: Path) -> None:
    shape = read_model_shape(base)
    stored: Counter[torch.dtype] = read_dtypes(base, shape, is_mcore=False)
    needed = sum(dtype.itemsize * number for dtype, number in stored.items())
    if (free := free_bytes(folder)) < needed:
        raise ValueError(
            f"the disk of {folder} has {size_text(free)} free, and the merged model takes "
            f"{size_text(needed)}: free some, set XDG_CACHE_HOME to another disk, or merge with "
            f"`rlsys export {adapter.folder} --merge --to hf NEW`, and name NEW"
        )
    save_merged_folder(base, adapter, folder, main_dtype=stored.most_common(1)[0][0])


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlsys" / "merged"


def _fingerprint(source: ModelSource) -> str:
    """Changes whenever the adapter or its base does."""
    assert source.adapter is not None
    digest = hashlib.sha256((source.adapter.folder / CONFIG_FILE).read_bytes())
    with source.adapter.weights.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    for file_of_base in weight_files(source.folder):
        status = file_of_base.stat()
        digest.update(f"{file_of_base.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
