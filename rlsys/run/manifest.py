"""The manifest of a checkpoint: it lists every other file with its size and SHA-256."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rlsys.file_sums import FileSum, files_below, sum_files
from rlsys.files import replacing
from rlsys.model.weight_files import (
    DATA_FILE,
    MANIFEST_FILE,
    ROLLOUTS_FILE,
    read_header,
    weight_files,
)

_VERSION = 1


def write_manifest(folder: Path, step: int, files: dict[str, FileSum]) -> None:
    """Write the manifest of a checkpoint, the last one of its files.

    Args:
        folder: of the checkpoint, which holds everything else.
        step: of the checkpoint.
        files: those that their writers have summed; what is missing here is read now.
    """
    missing = [name for name in files_below(folder) if name not in {*files, MANIFEST_FILE}]
    files = files | sum_files(folder, missing)
    content = {
        "version": _VERSION,
        "step": step,
        "files": {name: asdict(files[name]) for name in sorted(files)},
    }
    with replacing(folder / MANIFEST_FILE) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, FileSum] | None:
    """The files that a checkpoint consists of; None if an older rlsys wrote it, without a manifest.

    Raises:
        ValueError: the manifest is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        return {name: FileSum(**entry) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST_FILE} cannot be read") from None


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's files, by its manifest; 0 without one."""
    try:
        return sum(file.bytes for file in (read_manifest(folder) or {}).values())
    except ValueError:
        return 0


def checkpoint_problem(folder: Path, *, read_all: bool) -> str | None:
    """What is wrong with a checkpoint; None if it is whole.

    Args:
        folder: of the checkpoint.
        read_all: whether every byte is compared; else names and sizes only.
    """
    try:
        files = read_manifest(folder)
        problems = _of_older(folder) if files is None else _unlike(folder, files, read_all=read_all)
        return next(problems, None)
    except (OSError, ValueError) as error:
        return str(error)


def model_problem(folder: Path) -> str | None:
    """What is wrong with the model or adapter in a checkpoint, by names and sizes.

    None is also the answer for a folder of something else, such as a model of the hub.
    """
    if not (folder / "optimizer").is_dir():
        return None
    try:
        files = read_manifest(folder) or {}
    except ValueError as error:
        return str(error)
    of_model = {name: file for name, file in files.items() if "/" not in name}
    return next(_unlike(folder, of_model, read_all=False), None)


def _unlike(folder: Path, files: dict[str, FileSum], *, read_all: bool) -> Iterator[str]:
    """What differs from the manifest."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (size := os.stat(path).st_size) != expected.bytes:
            cut = ", it is cut off" if size < expected.bytes else ""
            yield f"{name} has {size:,} bytes, and {expected.bytes:,} were written{cut}"
    if read_all:
        found = sum_files(folder, files)
        for name, expected in files.items():
            if found[name] != expected:
                yield f"{name} holds other bytes than were written (its SHA-256 differs)"


def _of_older(folder: Path) -> Iterator[str]:
    """What shows without a manifest, which rlsys has written since version 0.1."""
    for name in (ROLLOUTS_FILE, DATA_FILE):
        path = folder / name
        if path.is_file():
            try:
                json.loads(path.read_bytes())
            except ValueError:
                yield f"{name} is not JSON, it is cut off or damaged"
    for file in weight_files(folder):
        read_header(file)
    common = folder / "optimizer" / "common.pt"
    if common.is_file() and not zipfile.is_zipfile(common):
        yield "optimizer/common.pt is cut off or damaged"
