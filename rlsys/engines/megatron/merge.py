"""A LoRA adapter merged into the tensors of its base, one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rlsys.engines.megatron.hf_folder import (
    converted,
    stored_tensors,
    untrained_tensors,
    write_model_files,
)
from rlsys.files import replacing_folder
from rlsys.model.families.base import HF_EMBEDDING, HF_OUTPUT, weight_table
from rlsys.model.lora import PEFT
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.model.stored_adapter import StoredAdapter
from rlsys.model.tokenizer_files import has_tokenizer

_A_AND_B = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)
"""How the names of the two factors end: of a linear layer, of an embedding."""
_TOKENIZER_FILES = (
    *("tokenizer*.json", "added_tokens.json", "special_tokens_map.json", "chat_template.*"),
    *("vocab.*", "merges.txt", "*.model"),
)


@dataclass(frozen=True, slots=True)
class _Change:
    """What an adapter does to one tensor of the base."""

    factors: tuple[str, str] | None
    """Names of A and B; None if the adapter replaces the tensor."""
    whole: str | None
    """Name of the tensor that replaces it."""


class MergedTensors:
    """The tensors of a base with an adapter merged into them.

    Args:
        adapter: what is merged.

    Raises:
        ValueError: a tensor of the adapter has a name that is not LoRA's, or lacks its other
            factor.
    """

    def __init__(self, adapter: StoredAdapter):
        self._adapter = adapter
        with self._open() as file:
            self._changes = _changes(adapter, list(file.keys()))

    def check_base(self, shape: ModelShape) -> None:
        """Refuse an adapter that cannot be merged into a model of that shape.

        Raises:
            ValueError: it names a tensor that the base does not have, or changes one of two that
                are one.
        """
        shared = {HF_EMBEDDING, HF_OUTPUT} & self._changes.keys()
        if shape.tied and shared:
            raise ValueError(
                f"{self._adapter.folder} changes {' and '.join(sorted(shared))}, and its base "
                f"{self._adapter.base} has one tensor for embedding and output head: merged, the "
                "change would be in both"
            )
        names = {name for row in weight_table(shape) for name in row.hf_names}
        unknown = sorted(self._changes.keys() - names)
        if unknown:
            raise ValueError(
                f"{self._adapter.folder} changes {len(unknown)} tensors that its base "
                f"{self._adapter.base} does not have, such as {unknown[0]}: it was trained on "
                "another model"
            )

    def merged(
        self, tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor of the base, changed: the sum is computed in fp32 and rounded once.

        Args:
            tensors: of the base, as they are stored.
            dtype: of the results; None keeps the base's.

        Raises:
            ValueError: shapes do not fit, or a number is too large for `dtype`.
        """
        with self._open() as file:
            for name, base in tensors:
                result = self._change(file, name, base)
                yield name, converted(name, result, dtype or base.dtype)

    def _open(self) -> Any:
        return safe_open(self._adapter.weights, "pt")

    def _change(self, file: Any, name: str, base: torch.Tensor) -> torch.Tensor:
        change = self._changes.get(name)
        if change is None:
            return base
        if change.factors is None:
            result = file.get_tensor(change.whole)
        else:
            a, b = (file.get_tensor(factor).float() for factor in change.factors)
            result = b @ a
            if change.factors[0].endswith("embedding_A"):
                result = result.T
            result *= self._adapter.scaling(name.removesuffix(".weight"))
        if result.shape != base.shape:
            raise ValueError(
                f"{self._adapter.folder} has a change of shape {tuple(result.shape)} for {name}, "
                f"and its base {self._adapter.base} a tensor of {tuple(base.shape)}: it was "
                "trained on another model"
            )
        return result if change.factors is None else base.float() + result


def save_merged_folder(
    base: Path,
    adapter: StoredAdapter,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    main_dtype: torch.dtype,
    max_shard_bytes: int | None = None,
) -> None:
    """Write `base` with the adapter merged in as a model folder; it is whole or not there.

    A tokenizer beside the adapter replaces the base's: it was trained with that.

    Args:
        dtype: of all weights; None keeps the base's types.
        main_dtype: the type that config.json names.
        max_shard_bytes: bytes of a weight file at most.

    Raises:
        ValueError: see `MergedTensors`.
    """
    shape = read_model_shape(base)
    merged = MergedTensors(adapter)
    merged.check_base(shape)
    tensors = merged.merged(stored_tensors(base, shape, None), dtype)
    tensors = chain(tensors, untrained_tensors(base, dtype))
    with replacing_folder(folder) as partial:
        write_model_files(base, partial, tensors, main_dtype, max_shard_bytes)
        for pattern in _TOKENIZER_FILES if has_tokenizer(adapter.folder) else ():
            for file in adapter.folder.glob(pattern):
                shutil.copyfile(file, partial / file.name)


def _changes(adapter: StoredAdapter, names: list[str]) -> dict[str, _Change]:
    """Tensor of the base -> what happens to it."""
    changes: dict[str, _Change] = {}
    # PEFT may store the base of an adapted embedding, too, and trained biases of adapted layers.
    rest = {name for name in names if not name.endswith(".base_layer.weight")}
    for end_a, end_b in _A_AND_B:
        for name in names:
            module = name.removesuffix(end_a)
            if name.endswith(end_a) and module + end_b in rest:
                rest -= {name, module + end_b}
                weight = f"{module.removeprefix(PEFT)}.weight"
                changes[weight] = _Change((name, module + end_b), None)
    # PEFT stores whole modules under the name of the module alone.
    strange = sorted(name for name in rest if "lora_" in name or not name.startswith(PEFT))
    if strange:
        raise ValueError(
            f"{adapter.folder} holds {strange[0]}, which is neither a whole tensor nor has both "
            "factors of a LoRA layer: merge it with PEFT, and name the model that this gives"
        )
    replaced = {
        name.removeprefix(PEFT).replace(".base_layer.", "."): _Change(None, name) for name in rest
    }
    return changes | replaced
