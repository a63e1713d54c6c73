"""What the ranks of a model save: copied to host memory, and written by a thread."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from rlsys.engines.megatron.background import (
    FilesOfFirst,
    Write,
    in_host_memory,
    popped,
    write_now,
)
from rlsys.engines.megatron.checkpoint import CheckpointFiles
from rlsys.engines.megatron.hf_folder import untrained_tensors, write_model_files
from rlsys.engines.megatron.nonfinite import check_finite
from rlsys.engines.megatron.trained import base_name

if TYPE_CHECKING:
    from rlsys.engines.megatron.model import MegatronModel
    from rlsys.engines.megatron.policy import MegatronPolicy


def begin_model(model: MegatronModel, folder: Path) -> None:
    """Start writing a model's files into an existing folder, with `model.writer`.

    Raises:
        NonFiniteWeights: it holds NaNs or infinities.
    """
    check_finite(f"the {model.role}", model.model.named_parameters())
    in_background = model.config.checkpoint.async_save
    write = _stage(model, folder, copies=in_background, is_adapter=model.saves_adapter)
    model.writer.start(folder, FilesOfFirst(write), in_background=in_background)


def begin_checkpoint(policy: MegatronPolicy, folder: Path) -> None:
    """Start writing the model or its adapter, and the optimizer's state, into an empty folder.

    Every rank calls. `policy.writer` knows when all is on the disk.
    """
    copies = policy.config.checkpoint.async_save
    files = CheckpointFiles(
        folder,
        _stage(policy, folder, copies=copies, is_adapter=policy.adapters is not None),
        policy.weights,
        policy.optimizer,
        policy.scheduler,
        policy_version=policy.policy_version,
        copies=copies,
    )
    policy.writer.start(folder, files, in_background=copies)


def _stage(model: MegatronModel, folder: Path, *, copies: bool, is_adapter: bool) -> Write:
    """A function that writes a model or its adapter into an existing folder; every rank calls.

    With `copies` it writes what the weights are now. Else it has nothing left to do but to raise
    what went wrong: the other ranks took part in a write that is over.
    """
    if is_adapter:
        assert model.adapters is not None
        return model.adapters.stage_files(folder, base_name(model.config, model.folder))
    tensors = model.whole_weights().export()
    if dist.get_rank() != 0:
        for _ in tensors:  # takes part in the collectives
            pass
        return lambda: None

    def write(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        everything = chain(tensors, untrained_tensors(model.folder, shape=model.shape))
        changes = model.config_changes
        write_model_files(model.folder, folder, everything, model.dtype, changes=changes)

    if copies:
        staged = [(name, in_host_memory(tensor)) for name, tensor in tensors]
        return lambda: write(popped(staged))
    return write_now(tensors, write)
