"""An optimizer's state for an optimizer of the other kind, distributed over replicas or not.

Both store the moments of each parameter under the same names. They differ in the name of the
float32 weights, which the plain optimizer of a float32 model does not have, and in the place of the
number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer

_STATE = "optimizer.state."
_MASTERS = (f"{_STATE}param.", f"{_STATE}fp32_param.")
"""How names of float32 weights begin, in a distributed optimizer and in a plain one."""


def fit_masters(state: Any, stored: set[str], current: Callable[[], Any]) -> Any:
    """The sharded state of an optimizer, with the names of a checkpoint.

    Args:
        state: of the optimizer that loads.
        stored: names of the tensors in the checkpoint.
        current: the same state with what the optimizer holds now. Where the checkpoint has no
            float32 weights, the model's are float32, are loaded, and are what it holds.
    """
    found = [start for start in _MASTERS if any(name.startswith(start) for name in stored)]
    if not found:
        return _with_masters_of(state, current())
    return _renamed(state, found[0])


def _renamed(state: Any, start: str) -> Any:
    if isinstance(state, dict):
        return {key: _renamed(value, start) for key, value in state.items()}
    if isinstance(state, list):
        return [_renamed(value, start) for value in state]
    if not _is_master(state):
        return state
    own = next(one for one in _MASTERS if state.key.startswith(one))
    return replace(state, key=start + state.key.removeprefix(own))


def _with_masters_of(state: Any, current: Any) -> Any:
    if isinstance(state, dict):
        return {key: _with_masters_of(value, current[key]) for key, value in state.items()}
    if isinstance(state, list):
        return [_with_masters_of(*pair) for pair in zip(state, current, strict=True)]
    return LocalNonpersistentObject(current.data) if _is_master(state) else state


def _is_master(value: Any) -> bool:
    if not isinstance(value, ShardedTensor | ShardedTensorFactory):
        assert not (isinstance(value, ShardedBase) and value.key.startswith(_MASTERS)), value
        return False
    return value.key.startswith(_MASTERS)


def set_steps(own: Any, saved: Any, optimizer: MegatronOptimizer) -> None:
    """Give the state of each own optimizer the number of steps that was saved.

    Transformer Engine's Adam and DistributedOptimizer count in groups of parameters, torch's AdamW
    elsewhere counts for each parameter, which megatron-core saves as `common_step`.
    """
    steps = [
        part[key]
        for container, key in (("param_groups", "step"), ("state", "common_step"))
        for part in parts(saved, container)
        if key in part
    ]
    if not steps:  # the checkpoint of a run that took no step
        return
    one = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    is_torch = isinstance(one.optimizer, torch.optim.AdamW)
    step: Any = float(steps[0]) if is_torch else int(steps[0])
    if is_torch and not optimizer.config.use_distributed_optimizer:
        container, key, step = "state", "common_step", torch.tensor(step)
    else:  # numbers, which megatron-core compares between groups
        container, key = "param_groups", "step"
    for part in parts(own, container):
        part[key] = step


def parts(state: Any, name: str) -> Iterator[dict[Any, Any]]:
    """The mappings under `name`, wherever that is in nested mappings."""
    for key, value in state.items() if isinstance(state, dict) else ():
        if key == name:
            yield from value if isinstance(value, list) else [value]
        else:
            yield from parts(value, name)
