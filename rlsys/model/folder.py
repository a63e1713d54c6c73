"""Where a model's folder is, and the JSON files in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LFS_POINTER = b"version https://git-lfs"


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file of a model folder says; empty if there is no such file.

    Raises:
        ValueError: the file is not a JSON object; the text says what to do.
    """
    if not file.is_file():
        return {}
    refuse_lfs_pointer(file)
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}. Download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object: download it again")
    return values


def refuse_lfs_pointer(file: Path) -> None:
    """Raise ValueError if a clone left the file to Git LFS."""
    with file.open("rb") as content:
        if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{file} is a pointer of Git LFS, not the file: run `git lfs pull` in {file.parent}"
            )
