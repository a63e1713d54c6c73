"""Snapshots of a rank: its bytes, from which a rank in a new process goes on to the bit.

A checkpoint stores tensors by their place in the whole model, so that another layout can load it. A
snapshot is for a rank at the same place of the same layout. It has the memory of the tensors that
updates change: trained weights, buffers such as the biases of routers, the optimizer's float32 copy
and moments. Frozen weights, the base of a LoRA adapter among them, come from the model's folder.

Gradients are not part of it, since each update begins with zeros; nor is random state, see
`rlsys.engines.megatron.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlsys.engines.megatron.offload import inner_optimizers, memory_of
from rlsys.engines.rank_state import (
    OptimizerState,
    RankState,
    StoredTensor,
    TensorPlace,
    checksums_of,
)

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from rlsys.engines.megatron.policy import MegatronPolicy

_SCALES = "scale of "
"""What Transformer Engine's AdamW keeps of a part of its state in 8 or 16 bits, by a name."""


class _Memory:
    """The storages of tensors, each once, in the order in which they were first seen."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        self._numbers: dict[tuple[str, int], int] = {}
        self.storages: list[torch.UntypedStorage] = []
        for tensor in tensors:
            self.number_of(tensor)

    def number_of(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = (str(storage.device), storage.data_ptr())
        if key not in self._numbers:
            self._numbers[key] = len(self.storages)
            self.storages.append(storage)
        return self._numbers[key]

    def place(self, tensor: torch.Tensor) -> TensorPlace:
        return TensorPlace(
            storage=self.number_of(tensor),
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()),
            on_host=tensor.device.type == "cpu",
        )


def take_snapshot(policy: MegatronPolicy) -> RankState:
    """The state of this rank of the policy; see `take_state`."""
    policy.offload.check("take_snapshot", optimizer=True)
    policy.offload.await_optimizer()
    version, tensors = policy.policy_version, policy.offload.changing_tensors()
    return take_state(version, tensors, policy.optimizer, policy.scheduler)


def restore_snapshot(policy: MegatronPolicy, state: RankState) -> int:
    """Go on from a snapshot, see `put_state`; returns its version."""
    policy.offload.check("restore_snapshot", optimizer=True)
    policy.offload.await_optimizer()
    put_state(state, policy.offload.changing_tensors(), policy.optimizer, policy.scheduler)
    policy.go_on_from(state.version)
    return state.version


def take_state(
    version: int,
    tensors: Iterable[torch.Tensor],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> RankState:
    """The state of this rank after `version` updates.

    On CPU it views the rank's own memory: nothing is copied.

    Args:
        tensors: what changes beside the optimizer's own: weights and buffers.
    """
    optimizers = [] if optimizer is None else list(inner_optimizers(optimizer))
    memory = _Memory(_fixed(tensors, optimizers))
    states = [
        OptimizerState(
            groups=[{k: v for k, v in g.items() if k != "params"} for g in one.param_groups],
            values=[
                {name: _stored(value, memory) for name, value in _state_of(one, parameter).items()}
                for parameter in _parameters(one)
            ],
        )
        for one in optimizers
    ]
    arrays = [_bytes(storage).cpu().numpy() for storage in memory.storages]
    steps = 0 if scheduler is None else scheduler.num_steps
    return RankState(version, arrays, checksums_of(arrays), states, steps)


def put_state(
    state: RankState,
    tensors: Iterable[torch.Tensor],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> None:
    """Go on from a state that a rank of the same place took.

    Raises:
        ValueError: its bytes are not those that were taken.
    """
    state.check()
    optimizers = [] if optimizer is None else list(inner_optimizers(optimizer))
    storages = dict(enumerate(_Memory(_fixed(tensors, optimizers)).storages))
    if optimizer is not None:
        _make_own_state(optimizer)
    for one, saved in zip(optimizers, state.optimizers, strict=True):
        for group, settings in zip(one.param_groups, saved.groups, strict=True):
            group.update(settings)
        for parameter, values in zip(_parameters(one), saved.values, strict=True):
            made = _state_of(one, parameter)
            one.state.pop(parameter, None)
            own = {
                name: _found(value, made.get(name), storages, state.memory, parameter.device)
                for name, value in values.items()
            }
            if own:
                one.state[parameter] = {
                    name: value for name, value in own.items() if not name.startswith(_SCALES)
                }
    assert sorted(storages) == list(range(len(state.memory))), "a snapshot of another layout"
    for number, array in enumerate(state.memory):
        _fill(storages[number], array)
    if scheduler is not None:
        scheduler.num_steps = 0
        scheduler.step(increment=state.num_scheduler_steps)


def _fixed(tensors: Iterable[torch.Tensor], optimizers: Sequence[Any]) -> Iterator[torch.Tensor]:
    """What has memory from the start: the optimizer's other state comes with its first step."""
    yield from tensors
    for one in optimizers:
        for parameter in _parameters(one):
            yield from memory_of(parameter)


def _parameters(one: Any) -> Iterator[torch.Tensor]:
    for group in one.param_groups:
        yield from group["params"]


def _state_of(one: Any, parameter: torch.Tensor) -> dict[str, Any]:
    """What torch's optimizer `one` keeps for a parameter."""
    scales = vars(one).get("_scales", {}).get(parameter, {})
    return one.state.get(parameter, {}) | {_SCALES + name: v for name, v in scales.items()}


def _make_own_state(optimizer: MegatronOptimizer) -> None:
    """Have Transformer Engine's AdamW make what only it can: state in 8 and 16 bits.

    It calls what `step` calls: megatron-core's `init_state_fn` passes one argument too few.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = one.optimizer
        if not one.config.use_precision_aware_optimizer or not hasattr(adam, "initialize_state"):
            continue
        for parameter in _parameters(adam):
            if not adam.state[parameter]:
                only_remainders = adam.store_param_remainders and parameter.dtype == torch.bfloat16
                adam.initialize_state(parameter, only_remainders)


def _stored(value: Any, memory: _Memory) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return StoredTensor(tuple(memory.place(part) for part in memory_of(value)))


def _found(
    value: Any,
    made: Any,
    storages: dict[int, torch.UntypedStorage],
    memory: Sequence[np.ndarray],
    device: torch.device,
) -> Any:
    """The tensor that stands for a stored one, `made` already or in new memory."""
    if not isinstance(value, StoredTensor):
        return value
    if made is not None:
        for place, part in zip(value.parts, memory_of(made), strict=True):
            storages[place.storage] = part.untyped_storage()
        return made
    (place,) = value.parts
    if place.storage not in storages:
        where = torch.device("cpu") if place.on_host else device
        size = memory[place.storage].nbytes
        storages[place.storage] = torch.empty(
            size, dtype=torch.uint8, device=where
        ).untyped_storage()
    return place.view(storages[place.storage])


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """All of its bytes, [nbytes] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _fill(storage: torch.UntypedStorage, array: np.ndarray) -> None:
    target = _bytes(storage)
    assert target.numel() == array.nbytes, "a snapshot of another layout"
    if target.device.type == "cpu":
        np.copyto(target.numpy(), array)
    else:
        target.copy_(torch.from_numpy(array.copy()))  # Ray's arrays cannot be written to
