"""The two formats of `rlsys export`, read and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlsys.engines.megatron.hf_folder import converted, save_model_folder, stored_tensors
from rlsys.engines.megatron.mcore_files import is_mcore_folder, stored_numbers
from rlsys.engines.megatron.on_cpu import enable_megatron_on_cpu, quiet_megatron
from rlsys.model.families.base import weight_table
from rlsys.model.shape import ModelShape
from rlsys.model.weight_files import read_header, weight_files

if TYPE_CHECKING:
    from rlsys.commands.export import Export
    from rlsys.engines.megatron.weights import MegatronWeights

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Names in safetensors files."""


def read_dtypes(folder: Path, shape: ModelShape, *, is_mcore: bool) -> Counter[torch.dtype]:
    """How many numbers of the model are stored in each type."""
    if is_mcore:
        return stored_numbers(folder)
    stored = {
        name: entry for file in weight_files(folder) for name, entry in read_header(file).items()
    }
    numbers: Counter[torch.dtype] = Counter()
    for row in weight_table(shape):
        for name in row.hf_names:
            dtype = _DTYPES[stored[name].dtype]
            numbers[dtype] += (stored[name].end - stored[name].start) // dtype.itemsize
    return numbers


def write_hf(export: Export) -> None:
    """Write a Hugging Face folder; of safetensors, one shard is in memory at a time."""

    def write(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        save_model_folder(
            export.folder, export.out, tensors, export.main_dtype, export.max_shard_bytes
        )

    if not export.is_mcore:
        write(stored_tensors(export.folder, export.shape, export.dtype))
        return
    with whole_model(export.folder, max(export.num_stored, key=lambda d: d.itemsize)) as (
        _,
        weights,
    ):
        write((name, converted(name, tensor, export.dtype)) for name, tensor in weights.export())


def write_mcore(export: Export) -> None:
    """Write a folder of megatron-core."""
    with whole_model(export.folder, export.main_dtype) as (_, weights):
        from rlsys.engines.megatron.mcore_folder import save_mcore_folder

        if export.main_dtype == torch.float16:
            for name, tensor in weights.export():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} holds numbers beyond float16's 65,504: use bfloat16")
        save_mcore_folder(export.folder, export.out, weights, export.main_dtype)


@contextmanager
def whole_model(folder: Path, dtype: torch.dtype) -> Iterator[tuple[Any, MegatronWeights]]:
    """megatron-core's model of a folder of either format, on CPU, with its weights as `dtype`."""
    quiet_megatron()
    enable_megatron_on_cpu()
    from rlsys.engines.megatron.mcore_folder import build_whole_model, load_mcore_folder, one_rank

    with one_rank():
        model, weights = build_whole_model(folder, dtype)
        if is_mcore_folder(folder):
            load_mcore_folder(folder, model, weights)
        else:
            weights.load(folder)
        yield model, weights
