"""Whether the weight files of a model folder are whole: a look at their headers, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

_POINTER = b"version https://git-lfs"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def weight_file_problems(folder: Path, files: Sequence[Path]) -> Iterator[str]:
    """What is wrong with the safetensors `files` of `folder`, and what to do."""
    for file in files:
        with file.open("rb") as content:
            start = content.read(max(len(_POINTER), _LENGTH_BYTES))
            if start.startswith(_POINTER):
                yield (
                    f"{file} is no weights but a pointer of Git LFS to them: run `git lfs pull` in "
                    f"{folder}"
                )
                continue
            header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
            if header_bytes > _MAX_HEADER_BYTES:
                yield f"{file} is no safetensors file: save the model with `save_pretrained`"
                continue
            content.seek(_LENGTH_BYTES)
            header = content.read(header_bytes)
        expected = _LENGTH_BYTES + header_bytes
        if len(header) == header_bytes:
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            expected += max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        size = file.stat().st_size
        if size < expected:
            yield (
                f"{file} is cut off, it has {size:,} bytes and by its header at least "
                f"{expected:,}: download it again"
            )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            yield f"{folder} lacks {', '.join(missing)}, which its index names: download it again"
