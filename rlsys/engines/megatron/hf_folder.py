"""Hugging Face model folders: lazy reading, atomic writing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlsys.files import replacing_folder
from rlsys.model.adapter_folder import WEIGHTS_FILE, write_adapter_config
from rlsys.model.families.base import Part, weight_table
from rlsys.model.lora import LoraPlan
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.model.weight_files import INDEX, OF_THE_RUN, RELEASE, UNTRAINED_FILE, weight_files
from rlsys.weight_sync.plan import DTYPES, shard_bounds

MAX_SHARD_BYTES = 4 * 2**30


class SafetensorsReader:
    """The tensors of a folder of safetensors files by name, each read only when asked for.

    Raises:
        ValueError: the folder holds no safetensors, or a tensor is missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        files = weight_files(folder)
        if not files:
            raise ValueError(
                f"{folder} holds no .safetensors file. Save the model with "
                "`model.save_pretrained(folder)` of transformers."
            )
        handles = [self._stack.enter_context(safe_open(file, "pt")) for file in files]
        self._handle_of = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the folder."""
        return list(self._handle_of)

    def shard(self, name: str, axis: int | None, rank: int, num_shards: int) -> torch.Tensor:
        """Slice `rank` of `num_shards` of tensor `name` along `axis`; all if None."""
        tensor = self._slice(name)
        if axis is None or num_shards == 1:
            return tensor[:]
        own = slice(*shard_bounds(tensor.get_shape()[axis], rank, num_shards))
        return tensor[own] if axis == 0 else tensor[:, own]

    def part(self, part: Part, axis: int | None, rank: int, num_shards: int) -> torch.Tensor:
        """Slice `rank` of `num_shards` of a part along `axis`; all if None."""
        tensor = self._slice(part.hf_name)
        if tuple(tensor.get_shape()) == part.shape:
            return self.shard(part.hf_name, axis, rank, num_shards)
        assert axis in (0, None), part
        rows = part.shape[0]
        first, last = (0, rows) if axis is None else shard_bounds(rows, rank, num_shards)
        return tensor[part.start + first : part.start + last]

    def _slice(self, name: str) -> Any:
        if name not in self._handle_of:
            raise ValueError(f"tensor {name!r} is missing in {self.folder}")
        return self._handle_of[name].get_slice(name)


def stored_tensors(
    folder: Path, shape: ModelShape, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model folder in the model's order, each read when its turn comes.

    Args:
        folder: holds safetensors.
        shape: the one in config.json.
        dtype: what all are converted to; None keeps the types that are stored.

    Raises:
        ValueError: a number is too large for `dtype`.
    """
    with SafetensorsReader(folder) as reader:
        for row in weight_table(shape):
            for name in row.hf_names:
                own_type = dtype if row.dtype is None else DTYPES[row.dtype]
                yield name, converted(name, reader.shard(name, None, 0, 1), own_type)


def untrained_tensors(
    folder: Path, dtype: torch.dtype | None = None, shape: ModelShape | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of layers that predict further tokens, which are copied and not trained.

    Args:
        folder: of a model; beside megatron-core's files they are in `release/`.
        dtype: what they are converted to; None keeps their types.
        shape: the model's; None reads that of a language model.
    """
    shape = shape or read_model_shape(folder, may_bridge=True)
    place = folder / RELEASE if (folder / RELEASE / UNTRAINED_FILE).is_file() else folder
    if not weight_files(place):
        return
    with SafetensorsReader(place) as reader:
        for name in filter(shape.is_in_mtp_layer, reader.names):
            yield name, converted(name, reader.shard(name, None, 0, 1), dtype)


def converted(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """`tensor` as `dtype`; None keeps its type.

    Raises:
        ValueError: a number is too large for `dtype`.
    """
    if dtype is None or dtype == tensor.dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(result).all() and tensor.isfinite().all():
        raise ValueError(
            f"{name} holds {tensor.abs().max():g}, and float16 ends at 65,504: use bfloat16"
        )
    return result


def save_model_folder(
    source: Path,
    folder: Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write `folder` as a model folder, see `write_model_files`; it is whole or not there."""
    with replacing_folder(folder) as partial:
        write_model_files(source, partial, tensors, dtype, max_shard_bytes, changes=changes)


def write_model_files(
    source: Path,
    folder: Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights `tensors`, and config and tokenizer of `source`, into an empty folder.

    Args:
        dtype: the type that config.json names.
        max_shard_bytes: bytes of a weight file at most; None is MAX_SHARD_BYTES.
        changes: keys of config.json that are others than in `source`.
    """
    copy_model_files(source, folder, dtype, changes)
    _write_shards(folder, tensors, max_shard_bytes or MAX_SHARD_BYTES)


def write_adapter_files(
    folder: Path, tensors: dict[str, torch.Tensor], plan: LoraPlan, base_model: str
) -> None:
    """Write an adapter as PEFT's files into an existing folder."""
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_adapter_config(folder, plan, base_model)
    (folder / WEIGHTS_FILE).chmod(0o644)


def copy_model_files(
    source: Path, folder: Path, dtype: torch.dtype, changes: Mapping[str, Any] | None = None
) -> None:
    """Copy config, tokenizer, chat template and all else that belongs to the model `source`.

    Not copied: weights, and what a run saves beside them.

    Args:
        dtype: what the config.json of `folder` says.
        changes: further keys in which it is another than in `source`.
    """
    for file in source.iterdir():
        if file.is_file() and not _is_left_out(file):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    config |= changes or {}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _is_left_out(file: Path) -> bool:
    return (
        ".safetensors" in file.name
        or file.suffix in (".bin", ".gguf", ".pt", ".pth", ".distcp")
        or file.name in OF_THE_RUN
    )


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], max_bytes: int
) -> None:
    """Shards of at most `max_bytes`, one in memory at a time; an index if there are more."""
    shards: list[tuple[Path, list[str]]] = []
    total_bytes = 0

    def flush(shard: dict[str, torch.Tensor]) -> None:
        file = folder / f"shard-{len(shards)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", file)  # safetensors lets only the owner read it
        shards.append((file, list(shard)))

    shard: dict[str, torch.Tensor] = {}
    shard_bytes = 0
    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_bytes:
            flush(shard)
            shard, shard_bytes = {}, 0
        # The exporter may reuse its buffers, and one file must not hold two views of one storage.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        del tensor  # or it stays in memory while the next one is read
    flush(shard)
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
