"""The two formats of `rlsys export`, read and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlsys.engines.megatron.hf_folder import save_model_folder, stored_tensors, untrained_tensors
from rlsys.engines.megatron.mcore_files import is_mcore_folder, stored_numbers
from rlsys.engines.megatron.merge import save_merged_folder
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
    """How many numbers are stored in each type, without those whose type the family says."""
    table = weight_table(shape)
    if is_mcore:
        own_type = tuple(row.names[0].rpartition(".")[2] for row in table if row.dtype is not None)
        return stored_numbers(folder, without=own_type)
    kept = {name for row in table if row.dtype is None for name in row.hf_names}
    numbers: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        for name, entry in read_header(file).items():
            if name in kept or shape.is_in_mtp_layer(name):
                dtype = _DTYPES[entry.dtype]
                numbers[dtype] += (entry.end - entry.start) // dtype.itemsize
    return numbers


def write_hf(export: Export) -> None:
    """Write a Hugging Face folder; of safetensors, one shard is in memory at a time."""
    if export.adapter is not None:
        save_merged_folder(
            export.folder,
            export.adapter,
            export.out,
            dtype=export.dtype,
            main_dtype=export.main_dtype,
            max_shard_bytes=export.max_shard_bytes,
        )
        return
    with ExitStack() as stack:
        if export.is_mcore:
            _, weights = stack.enter_context(whole_model(export.folder, export.main_dtype))
            tensors = weights.export()
        else:
            tensors = stored_tensors(export.folder, export.shape, export.dtype)
        save_model_folder(
            export.folder,
            export.out,
            chain(tensors, untrained_tensors(export.folder, export.dtype)),
            export.main_dtype,
            export.max_shard_bytes,
        )


def write_mcore(export: Export) -> None:
    """Write a folder of megatron-core."""
    with whole_model(export.folder, export.main_dtype) as (_, weights):
        from rlsys.engines.megatron.mcore_folder import save_mcore_folder

        save_mcore_folder(export.folder, export.out, weights, export.main_dtype)


@contextmanager
def whole_model(
    folder: Path, dtype: torch.dtype, *, longest: int = 1
) -> Iterator[tuple[Any, MegatronWeights]]:
    """megatron-core's model of a folder of either format, on CPU, with its weights as `dtype`.

    Args:
        folder, dtype, longest: see `build_whole_model`.

    Raises:
        ValueError: a number is too large for `dtype`.
    """
    quiet_megatron()
    enable_megatron_on_cpu()
    from rlsys.engines.megatron.mcore_folder import build_whole_model, load_mcore_folder, one_rank

    with one_rank():
        model, weights = build_whole_model(folder, dtype, longest=longest)
        if is_mcore_folder(folder):
            load_mcore_folder(folder, model, weights)
        else:
            weights.load(folder)
        for name, parameter in model.named_parameters() if dtype == torch.float16 else ():
            if not parameter.isfinite().all():
                raise ValueError(f"{name} holds numbers beyond float16's 65,504: use bfloat16")
        yield model, weights
