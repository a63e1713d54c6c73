"""The model of a LoRA adapter for `rlsys infer` and `rlsys eval`: merged once, into a cache.

The cache keeps the models that were used last. Locks of the operating system, which end with the
process, keep two commands from writing to it at the same time, and models in use from being
removed. On a file system without locks nothing is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from rlsys.commands.export_formats import read_dtypes
from rlsys.engines.megatron.merge import save_merged_folder
from rlsys.files import bytes_in, free_bytes, size_text
from rlsys.model.adapter_folder import CONFIG_FILE
from rlsys.model.shape import read_model_shape
from rlsys.model.stored_adapter import StoredAdapter
from rlsys.model.weight_files import weight_files
from rlsys.run.folder import NO_LOCKS
from rlsys.run.model_source import ModelSource

KEPT = 4
"""Merged models that the cache keeps, unless commands use more of them at the same time."""
MERGE_S = 7200.0
"""Seconds to wait for a command that merges; the largest models take many minutes."""
_LOCK, _UNFINISHED = ".lock", (".partial", ".replaced")
_in_use: list[IO[bytes]] = []
"""Files whose locks say which models this process uses, to its end."""


def with_merged_adapter(source: ModelSource) -> ModelSource:
    """`source` with a folder that vLLM can load: of an adapter, its base with it merged in.

    Raises:
        ValueError: the adapter is for another model, or the disk is full.
    """
    if source.adapter is None:
        return source
    cache = _cache()
    folder = cache / f"{source.saved.resolve().name}-{_fingerprint(source)}"
    with _alone_in(cache):
        if not folder.is_dir():
            _write(source.folder, source.adapter, folder)
            _say(
                f"merged {source.label} into {folder}, {size_text(bytes_in(folder))}: later "
                f"commands use it; the {KEPT} models that were used last are kept"
            )
        os.utime(folder)
        file = (folder / "config.json").open("rb")
        if _lock(file, fcntl.LOCK_SH):
            _in_use.append(file)
    return replace(source, folder=folder)


def _write(base: Path, adapter: StoredAdapter, folder: Path) -> None:
    shape = read_model_shape(base)
    stored: Counter[torch.dtype] = read_dtypes(base, shape, is_mcore=False)
    needed = sum(dtype.itemsize * number for dtype, number in stored.items())
    _make_room(folder.parent, needed)
    if (free := free_bytes(folder)) < needed:
        raise ValueError(
            f"the disk of {folder} has {size_text(free)} free, and the merged model takes "
            f"{size_text(needed)}: free some, set XDG_CACHE_HOME to another disk, or merge with "
            f"`rlsys export {adapter.folder} --merge --to hf NEW`, and name NEW"
        )
    save_merged_folder(base, adapter, folder, main_dtype=stored.most_common(1)[0][0])


def _make_room(cache: Path, needed: int) -> None:
    """Remove models for one more of `needed` bytes: those that were not used for longest first."""
    folders = [path for path in cache.iterdir() if path.is_dir()]
    for leftover in (path for path in folders if path.suffix in _UNFINISHED):  # of killed commands
        shutil.rmtree(leftover, ignore_errors=True)
    models = [path for path in folders if path.suffix not in _UNFINISHED]
    number = len(models)
    for folder in sorted(models, key=lambda path: path.stat().st_mtime):
        if number < KEPT and free_bytes(cache) >= needed:
            return
        if _is_in_use(folder):
            continue
        why = f"{KEPT} are kept" if number >= KEPT else "the disk has no room for another one"
        size = size_text(bytes_in(folder))
        removed = folder.rename(folder.with_name(folder.name + _UNFINISHED[0]))
        shutil.rmtree(removed)
        number -= 1
        _say(f"removed {folder}, {size}: of merged models it was not used for longest, and {why}")


def _is_in_use(folder: Path) -> bool:
    """Whether a command uses a model, or may use it: file systems may lack locks."""
    try:
        file = (folder / "config.json").open("rb")
    except OSError:  # not a model: nothing can use it
        return False
    with file:
        return not _lock(file, fcntl.LOCK_EX)


@contextmanager
def _alone_in(cache: Path) -> Iterator[None]:
    """Have other commands wait until this one has found or written its model."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / _LOCK).open("ab") as file:
        if _lock(file, fcntl.LOCK_EX) is False:
            _say(f"waiting for another command that merges a model into {cache}")
            deadline = time.monotonic() + MERGE_S
            while _lock(file, fcntl.LOCK_EX) is False:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another command has been merging a model into {cache} for {MERGE_S:g} s: "
                        "end it if it hangs, then try again"
                    )
                time.sleep(0.2)
        yield


def _lock(file: IO[bytes], kind: int) -> bool | None:
    """Lock a file until it is closed.

    Returns:
        Whether nobody else holds it; None where the file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
