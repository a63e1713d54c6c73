"""Models in megatron-core's torch_dist format, which loads with any parallel sizes.

One process writes and reads them on CPU: `one_rank` makes it a whole process group. The folder is
that of a release of Megatron-LM, with Hugging Face's config and tokenizer beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import save_file
from transformers import AutoConfig

from rlsys.config import PolicyConfig
from rlsys.engines.megatron.build import build_model, transformer_config
from rlsys.engines.megatron.checkpoint import save_torch_dist
from rlsys.engines.megatron.hf_folder import copy_model_files, untrained_tensors
from rlsys.engines.megatron.mcore_files import COMMON, check_mcore_files, mcore_weights
from rlsys.engines.megatron.parallel import ParallelLayout, initialize_parallel
from rlsys.engines.megatron.weights import MegatronWeights
from rlsys.files import replacing_folder
from rlsys.model.shape import read_model_shape
from rlsys.model.weight_files import RELEASE, TRACKER, UNTRAINED_FILE

_COLLECTIVE_TIMEOUT_S = 600.0
_COMMON = {"checkpoint_version": 3.0, "iteration": 0}
"""Without a version Megatron-LM takes query, key and value to be in an order of 2020."""


@contextmanager
def one_rank() -> Iterator[None]:
    """Be the only rank of a process group, on CPU, as long as the body runs."""
    layout = ParallelLayout(rank=0, world_size=1, timeout_s=_COLLECTIVE_TIMEOUT_S)
    initialize_parallel(layout, dist.HashStore(), device="cpu", seed=0)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_whole_model(
    folder: Path, dtype: torch.dtype, *, longest: int
) -> tuple[GPTModel, MegatronWeights]:
    """The model of `folder/config.json`, without its weights; call within `one_rank`.

    Args:
        folder: has the config.
        dtype: of the weights.
        longest: tokens of the longest sequence that it will compute.
    """
    shape, hf = (
        read_model_shape(folder),
        AutoConfig.from_pretrained(folder, trust_remote_code=False),
    )
    config = transformer_config(
        hf, shape, dtype=dtype, policy=PolicyConfig(), on_cpu=True, bridged=False
    )
    (model,) = build_model(hf, shape, config, longest=longest, on_cpu=True)
    return model.eval(), MegatronWeights([model], shape)


def save_mcore_folder(
    source: Path, folder: Path, weights: MegatronWeights, dtype: torch.dtype
) -> None:
    """Write `weights` of type `dtype`, with config and tokenizer of `source`; whole or not at all.

    Raises:
        OSError: the disk is full.
    """
    with replacing_folder(folder) as partial:
        copy_model_files(source, partial, dtype)
        state = weights.sharded_state()
        state |= {extra.unique_key: extra for extra in _extra_states(state)}
        save_torch_dist({"model": state}, partial / RELEASE)
        # megatron-core 0.19 has another place for this, and reads the older one too.
        torch.save(_COMMON | {"content_metadata": weights.sharding}, partial / RELEASE / COMMON)
        untrained = dict(untrained_tensors(source, dtype))
        if untrained:
            save_file(untrained, partial / RELEASE / UNTRAINED_FILE, metadata={"format": "pt"})
        (partial / TRACKER).write_text(RELEASE)


@torch.no_grad()
def load_mcore_folder(folder: Path, model: GPTModel, weights: MegatronWeights) -> None:
    """Read this rank's weights of a folder that `save_mcore_folder` wrote, in the model's dtype.

    Raises:
        ValueError: the files are damaged, not safe to read, or of another model.
    """
    check_mcore_files(folder)
    place = str(mcore_weights(folder))
    # Objects are pickles, and those here are empty.
    state = {k: v for k, v in weights.sharded_state().items() if not isinstance(v, ShardedObject)}
    stored = dist_checkpointing.load_tensors_metadata(place)
    _check_shapes(folder, state, stored, vocab_size=read_model_shape(folder).vocab_size)
    loaded = dist_checkpointing.load({"model": state}, place)["model"]
    left_out = model.load_state_dict(loaded, strict=False)
    assert not left_out.unexpected_keys, left_out
    assert all(key.endswith("_extra_state") for key in left_out.missing_keys), left_out


@torch.no_grad()
def logits(model: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    """[T] token ids of one sequence -> [T, V] logits of a whole model."""
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=len(ids),
        max_seqlen_kv=len(ids),
    )
    positions = torch.arange(len(ids))[None]
    return model(ids[None], positions, attention_mask=None, packed_seq_params=packed).squeeze(0)


def _check_shapes(
    folder: Path, state: dict[str, Any], stored: dict[str, ShardedTensor], *, vocab_size: int
) -> None:
    hint = "its weights and its config.json are of different models"
    for tensor in map(_first_tensor, state.values()):
        found = stored.get(tensor.key)
        if found is None:
            raise ValueError(f"{folder} lacks {tensor.key}: {hint}")
        rows, *others = found.global_shape
        if tensor.allow_shape_mismatch and rows >= vocab_size:  # it is filled up to a multiple
            rows = tensor.global_shape[0]
        if (rows, *others) != tensor.global_shape:
            raise ValueError(
                f"{folder}: {tensor.key} has shape {list(found.global_shape)}, by config.json it "
                f"is {list(tensor.global_shape)}: {hint}"
            )


def _extra_states(state: dict[str, Any]) -> Iterator[ShardedObject]:
    """What attention and norms of Transformer Engine look for beside weights, empty without FP8.

    megatron-core writes the same for linear layers.
    """
    for name, value in state.items():
        if isinstance(value, ShardedObject):
            continue
        tensor, (module, _, _) = _first_tensor(value), name.rpartition(".")
        place, _, _ = tensor.key.rpartition(".")
        if module.endswith(".linear_qkv"):
            place = place.replace(".linear_qkv", ".core_attention")
        elif not place.endswith("layernorm"):
            continue
        axes = tensor.prepend_axis_num
        shape, offset = tensor.global_shape[:axes] or (1,), tensor.global_offset[:axes] or (0,)
        if name.endswith(".weight"):
            yield ShardedObject(f"{place}._extra_state", None, shape, offset)


def _first_tensor(value: ShardedTensor | ShardedTensorFactory) -> ShardedTensor:
    built = value.build() if isinstance(value, ShardedTensorFactory) else [value]
    return next(nested_values(built))
