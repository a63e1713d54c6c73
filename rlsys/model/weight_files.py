"""The weight files of a model folder, by their headers: whole, and those of its config.json.

Without torch, so that a run is refused in its first second.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.model.families.base import HF_EMBEDDING, HF_OUTPUT, weight_table
from rlsys.model.shape import ModelShape

INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_COMPARED_BYTES = 2**24
_FLOATS = ("F64", "F32", "F16", "BF16")
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Old checkpoints hold the rotary frequencies, which follow from config.json."""
_MAX_NAMED = 3
_SAVE = "download it again, or save the model with `save_pretrained`"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte of its data in the file."""
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those of its index, or all without one."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def weight_file_problems(folder: Path) -> Iterator[str]:
    """Files that are missing or not whole, and what to do."""
    files = weight_files(folder)
    for file in files:
        yield from _file_problems(file)
    index = folder / INDEX
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            yield f"{folder} lacks {', '.join(missing)}, which its index names: download it again"
        if "model.safetensors" not in named and (folder / "model.safetensors").is_file():
            yield (
                f"{folder} holds model.safetensors and {INDEX}, which does not name it: two sets "
                "of weights, of which transformers reads one and vLLM the other. Delete one of them"
            )


def is_lfs_pointer(file: Path) -> bool:
    """Whether a clone has left the place of the file to Git LFS."""
    with file.open("rb") as content:
        return content.read(len(_POINTER)) == _POINTER


def lfs_problem(file: Path) -> str:
    """What is wrong with a pointer, and what to do."""
    return f"{file} is a pointer of Git LFS, not the file: run `git lfs pull` in {file.parent}"


def _file_problems(file: Path) -> Iterator[str]:
    if is_lfs_pointer(file):
        yield lfs_problem(file)
        return
    with file.open("rb") as content:
        start = content.read(_LENGTH_BYTES)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < _LENGTH_BYTES or header_bytes > _MAX_HEADER_BYTES:
            yield f"{file} is not a safetensors file: {_SAVE}"
            return
        header = content.read(header_bytes)
    expected = _LENGTH_BYTES + header_bytes
    if len(header) == header_bytes:
        try:
            tensors = json.loads(header)
        except ValueError:
            yield f"{file} is not a safetensors file: {_SAVE}"
            return
        tensors.pop("__metadata__", None)
        expected += max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    size = file.stat().st_size
    if size < expected:
        yield (
            f"{file} is cut off, it has {size:,} bytes and by its header at least "
            f"{expected:,}: download it again"
        )


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """What the headers of whole files name."""
    tensors = {}
    for file in files:
        with file.open("rb") as content:
            header_bytes = int.from_bytes(content.read(_LENGTH_BYTES), "little")
            header = json.loads(content.read(header_bytes))
        header.pop("__metadata__", None)
        first = _LENGTH_BYTES + header_bytes
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors[name] = StoredTensor(file, entry["dtype"], shape, first + start, first + end)
    return tensors


def weight_table_problems(folder: Path, shape: ModelShape) -> Iterator[str]:
    """Where the tensors of whole files are not those of the model in config.json."""
    stored = stored_tensors(weight_files(folder))
    expected = {
        name: hf_shape
        for row in weight_table(shape)
        for name, hf_shape in zip(row.hf_names, row.hf_shapes, strict=True)
    }
    found = {name: tensor for name, tensor in stored.items() if name in expected}
    missing = [name for name in expected if name not in stored]
    if missing:
        hint = "weights and config.json are of different models, or the download is not complete"
        if missing == [HF_OUTPUT]:
            hint = (
                "set tie_word_embeddings to true in config.json if the output head is the embedding"
            )
        elif any(f"model.{name}" in expected for name in stored):
            hint = "its names lack `model.`: save the model by its class ...ForCausalLM"
        yield f"{folder} lacks {_some(missing)}: {hint}"
    unknown = [
        name
        for name in stored
        if name not in expected and name != HF_OUTPUT and not name.endswith(_IGNORED_SUFFIX)
    ]
    if unknown:
        files = {stored[name].file for name in unknown}
        foreign = files.isdisjoint(tensor.file for tensor in found.values())
        yield (
            f"{folder}: {_some(sorted(file.name for file in files))} holds {_some(unknown)}, which "
            f"a {shape.model_type} of its config.json does not have: rlsys would leave them out, "
            "and compute another model"
            + (". Move the file elsewhere if it is not of this model" if foreign else "")
        )
    misshapen = [name for name, tensor in found.items() if tensor.shape != expected[name]]
    for name in misshapen[:_MAX_NAMED]:
        more = len(misshapen) - _MAX_NAMED
        yield (
            f"{found[name].file}: {name} has shape {list(found[name].shape)}, by config.json it is "
            f"{list(expected[name])}: weights and config.json are of different models"
            + (", or only one has the resized vocabulary" if name == HF_EMBEDDING else "")
            + (f"; {more} more are like it" if more > 0 and name == misshapen[0] else "")
        )
    for dtype in sorted({tensor.dtype for tensor in found.values()} - {*_FLOATS}):
        names = [name for name, tensor in found.items() if tensor.dtype == dtype]
        yield (
            f"{found[names[0]].file}: stored as {dtype}: {_some(names)}. rlsys trains weights in "
            "bfloat16 or float32: use the model that was quantized"
        )
    if shape.tied and HF_OUTPUT in stored and HF_EMBEDDING in stored:
        yield from _tied_problems(stored[HF_EMBEDDING], stored[HF_OUTPUT])


def _tied_problems(embedding: StoredTensor, output: StoredTensor) -> Iterator[str]:
    """A file may hold the output head of a tied model, but no other one than the embedding."""
    if embedding.dtype == output.dtype and _same_bytes(embedding, output):
        return
    yield (
        f"{output.file}: {HF_OUTPUT} differs from {HF_EMBEDDING}, and config.json has "
        "tie_word_embeddings = true, by which the output head is the embedding: set it to false "
        f"if the model was trained with a head of its own, else remove {HF_OUTPUT}"
    )


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if one.end - one.start != other.end - other.start:
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        left = mmap.mmap(first.fileno(), 0, access=mmap.ACCESS_READ)
        right = mmap.mmap(second.fileno(), 0, access=mmap.ACCESS_READ)
        with left, right:
            return all(
                left[one.start + at : min(one.start + at + _COMPARED_BYTES, one.end)]
                == right[other.start + at : min(other.start + at + _COMPARED_BYTES, other.end)]
                for at in range(0, one.end - one.start, _COMPARED_BYTES)
            )


def _some(names: Sequence[str]) -> str:
    """`a, b, c and 7 more`."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
