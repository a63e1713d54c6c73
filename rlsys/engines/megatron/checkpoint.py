"""The optimizer's state through megatron-core's dist_checkpointing: exact, and reshardable.

Stored by place in the whole model, so a run may continue with other tensor, pipeline, expert or
data parallelism. The weights are in Hugging Face's files beside it. Random state is not needed:
dropout is 0, and mini-batches are a function of (seed, version).
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.storage import WriteResult

from rlsys.engines.megatron.background import Write, in_host_memory
from rlsys.engines.megatron.mcore_files import check_index
from rlsys.engines.megatron.optimizer import optimizer_tensors
from rlsys.engines.megatron.optimizer_kinds import fit_masters, set_steps
from rlsys.engines.megatron.weights import MegatronWeights

if TYPE_CHECKING:
    from rlsys.engines.megatron.bridge import BridgedWeights

OPTIMIZER_FOLDER = "optimizer"
"""Name of the folder in a checkpoint."""
_STATES = ("param", "exp_avg", "exp_avg_sq")
"""What DistributedOptimizer keeps for each parameter, by megatron-core's names."""


class CheckpointFiles:
    """The model and the state of the optimizer, to be written later; every rank makes one.

    Args:
        folder: the checkpoint.
        write_model: writes the model or its adapter.
        weights, optimizer, scheduler: the policy's.
        policy_version: completed updates.
        copies: whether `write` comes after this rank has gone on.
    """

    def __init__(
        self,
        folder: Path,
        write_model: Write,
        weights: MegatronWeights | BridgedWeights,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        policy_version: int,
        copies: bool,
    ):
        self._write_model = write_model
        state = {
            "optimizer": _sharded_state(weights, optimizer, is_loading=False),
            "scheduler": scheduler.state_dict(),
            "policy_version": policy_version,
            "use_distributed_optimizer": optimizer.config.use_distributed_optimizer,
        }
        self._files = StagedFiles(state, folder / OPTIMIZER_FOLDER)
        live = {tensor.untyped_storage().data_ptr() for _, tensor in optimizer_tensors(optimizer)}
        self._files.leave_device(live if copies else set())

    def write(self) -> list[WriteResult]:
        """See Files."""
        self._write_model()
        return self._files.write()

    def names(self) -> list[str]:
        """See Files."""
        return [f"{OPTIMIZER_FOLDER}/{name}" for name in self._files.names()]

    def conclude(self, written: Sequence[list[WriteResult]]) -> None:
        """See Files."""
        self._files.conclude(written)


class StagedFiles:
    """A state of sharded tensors and other values that is ready to be written.

    megatron-core plans who writes what, and this class writes it: megatron-core's own way starts
    processes, and its last part needs collectives between those of the training.
    """

    def __init__(self, state: dict[str, Any], folder: Path):
        # The default queue of results starts a server process, which takes seconds.
        filesystem_async._results_queue = queue.Queue()
        folder.mkdir(exist_ok=True)
        plan = _Plan("torch_dist", 1)
        dist_checkpointing.save(state, str(folder), sharded_strategy=plan)
        self._writer, self._metadata = plan.writer, plan.metadata
        self._buckets = list(self._writer.write_buckets or [])

    def leave_device(self, live: set[int]) -> None:
        """Copy tensors to host memory; of those that are there, the ones in `live` storages."""
        self._buckets = [
            (path, key, (values, [(item, _host(tensor, live)) for item, tensor in tensors]))
            for path, key, (values, tensors) in self._buckets
        ]

    def write(self) -> list[WriteResult]:
        """Write this rank's files; returns what is where in them."""
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        results, counts = queue.Queue[Any](), queue.Queue[int]()
        written: list[WriteResult] = []
        while self._buckets:
            counts.put(0)
            FileSystemWriterAsync.write_preloaded_data(
                transforms, 0, self._buckets.pop(0), results, counts, True
            )
            _, found = results.get_nowait()
            if isinstance(found, Exception):
                raise found
            written += found
        self._names = sorted({result.storage_data.relative_path for result in written})
        return written

    def names(self) -> list[str]:
        """This rank's files; none on the first one, see Files."""
        return self._names if dist.get_rank() else []

    def conclude(self, written: Sequence[list[WriteResult]]) -> None:
        """Write the index of all ranks' files; the first rank calls."""
        self._writer.finish(self._metadata, list(written))


class _Plan(TorchDistSaveShardedStrategy):
    """megatron-core's plan for saving, without the saving."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


def _host(tensor: torch.Tensor, live: set[int]) -> torch.Tensor:
    is_copy = tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in live
    return tensor if is_copy else in_host_memory(tensor)


def save_torch_dist(state: dict[str, Any], folder: Path) -> None:
    """Write a state of sharded tensors and other values into `folder`, of one rank."""
    files = StagedFiles(state, folder)
    files.leave_device(set())
    files.conclude([files.write()])


def check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint that does not fit, before the policy changes.

    Raises:
        ValueError: an older rlsys wrote it.
    """
    if not (folder / OPTIMIZER_FOLDER).is_dir():
        raise ValueError(
            f"the checkpoint {folder} has no {OPTIMIZER_FOLDER}/: an older rlsys wrote it. "
            "Continue with that version, or start a new run with --overwrite"
        )
    check_index(folder / OPTIMIZER_FOLDER)


def load_optimizer(
    folder: Path,
    weights: MegatronWeights | BridgedWeights,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> int:
    """Continue from the checkpoint in `folder`, whose `weights` are loaded; return its version.

    The checkpoint gives the state of each parameter, and how many steps that is. All else, such as
    learning rates, is the config's, which may have changed.
    """
    place = str(folder / OPTIMIZER_FOLDER)
    common = dist_checkpointing.load_common_state_dict(place)
    own = _sharded_state(weights, optimizer, is_loading=True)
    set_steps(own, common["optimizer"], optimizer)
    if common["use_distributed_optimizer"] != optimizer.config.use_distributed_optimizer:
        stored = set(dist_checkpointing.load_tensors_metadata(place))
        current = partial(_sharded_state, weights, optimizer, is_loading=False)
        own = fit_masters(own, stored, current)
    # Tensors are found by their own names. Under another name than "optimizer" nothing that is not
    # a tensor is mixed in: with shared experts megatron-core has two optimizers, else one, and what
    # they save besides has another form.
    state = dist_checkpointing.load({"own": _with_own_values(own)}, place)
    with _remainders_as_saved():
        optimizer.load_state_dict(state["own"])
    scheduler.num_steps = 0
    scheduler.step(increment=common["scheduler"]["num_steps"])
    return common["policy_version"]


def _with_own_values(state: Any) -> Any:
    """A sharded state whose other values are not looked for in the checkpoint."""
    if isinstance(state, ShardedBase):
        return state
    if isinstance(state, dict | list) and any(
        isinstance(value, ShardedBase) for value in nested_values(state)
    ):
        if isinstance(state, list):
            return [_with_own_values(value) for value in state]
        return {key: _with_own_values(value) for key, value in state.items()}
    return LocalNonpersistentObject(_unwrapped(state))


def _unwrapped(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _unwrapped(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_unwrapped(value) for value in state]
    return state.unwrap() if isinstance(state, LocalNonpersistentObject) else state


def _sharded_state(
    weights: MegatronWeights | BridgedWeights, optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    metadata = weights.sharding | {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    parameters = weights.sharded_state()
    with _states_in_padded_places(optimizer):
        return optimizer.sharded_state_dict(parameters, is_loading=is_loading, metadata=metadata)


@contextmanager
def _remainders_as_saved() -> Iterator[None]:
    """Let Transformer Engine's AdamW read the 16 bits that bfloat16 weights lack.

    megatron-core (0.19) saves these whole numbers as float32, which holds them exactly, and the
    optimizer asks for int16 when they are loaded.
    """
    try:
        from transformer_engine.pytorch.optimizers import FusedAdam
    except ImportError:  # on CPU
        yield
        return

    def as_saved(self: FusedAdam, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        is_remainder = self.store_param_remainders and param.dtype == torch.bfloat16
        if is_remainder and name == "master_param":
            remainder = value.to(torch.int16)
            if not torch.equal(remainder.to(value.dtype), value):
                raise ValueError(
                    "the checkpoint holds float32 weights of the optimizer, and "
                    "policy.use_precision_aware_optimizer reads the 16 bits that bfloat16 lacks: "
                    "continue with the value that it was written with"
                )
            value = remainder
        own(self, param, name, value)

    own = FusedAdam.set_scaled_state
    FusedAdam.set_scaled_state = as_saved
    try:
        yield
    finally:
        FusedAdam.set_scaled_state = own


@contextmanager
def _states_in_padded_places(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Gather the states of parameters with our function in place of megatron-core's.

    megatron-core (0.16 to 0.19) concatenates the states of a buffer's buckets without the padding
    at the end of each, but cuts at places that count the padding. After a bucket with padding,
    every parameter would be saved with values of others: silently wrong weights after a resume.
    It also copies every number six times, which was most of what a step waits for a checkpoint.
    """
    sharded = [
        one
        for one in getattr(optimizer, "chained_optimizers", [optimizer])
        if isinstance(one, DistributedOptimizer)
    ]
    for one in sharded:
        one.get_parameter_state_dp_zero = partial(_gather_states, one)
    try:
        yield
    finally:
        for one in sharded:
            del one.get_parameter_state_dp_zero


def _gather_states(
    optimizer: DistributedOptimizer, *, empty_data: bool, **_: Any
) -> dict[Any, Any]:
    """Buffer -> type -> state -> its numbers in the places of the buffer, on every replica."""
    group = optimizer.data_parallel_group
    states: dict[Any, Any] = {"buckets_coalesced": True}
    for number, ranges in enumerate(optimizer.gbuf_ranges):
        ((dtype, maps),) = ranges.items()
        buckets = [bucket.grad_data for bucket in optimizer.buffers[number].buckets]
        whole = {key: torch.empty(sum(b.numel() for b in buckets)) for key in _STATES}
        first = 0
        for bucket, of_bucket in zip(buckets, maps, strict=True):
            end = first + bucket.numel()
            places = {key: tensor[first:end] for key, tensor in whole.items()}
            if not empty_data:
                _gather_bucket(optimizer, of_bucket["param_map"], bucket.device, group, places)
            first = end
        states[number] = {dtype: whole}
    return states


def _gather_bucket(
    optimizer: DistributedOptimizer,
    ranges: dict[torch.nn.Parameter, Any],
    device: torch.device,
    group: dist.ProcessGroup,
    places: dict[str, torch.Tensor],
) -> None:
    """Fill `places` with the states of a bucket, of which each replica has a part."""
    own = places
    if group.size() > 1:
        size = len(places["param"]) // group.size()
        own = {key: torch.zeros(size, device=device) for key in places}
    for parameter, of_parameter in ranges.items():
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        place = slice(of_parameter["gbuf_local"].start, of_parameter["gbuf_local"].end)
        for key, tensor in own.items():
            tensor[place].copy_(states[key].detach())
    if group.size() > 1:
        for key, tensor in own.items():
            gathered = torch.empty(len(places[key]), device=device)
            dist.all_gather_into_tensor(gathered, tensor, group=group)
            places[key].copy_(gathered)
