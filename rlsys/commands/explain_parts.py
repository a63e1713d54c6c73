"""What `rlsys explain` asks of each training method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from rlsys.config.schema import AnyConfig
from rlsys.model.memory import MemoryEstimate
from rlsys.model.shape import ModelShape
from rlsys.problems import Problem
from rlsys.types import Device

Pairs = list[tuple[str, str]]
"""(part, description) lines of a table."""


@dataclass(frozen=True, slots=True)
class Parts(Generic[AnyConfig]):
    """The parts of the explanation that differ between methods, as functions of the config."""

    problems: Callable[[AnyConfig], list[Problem]]
    """What would stop a run here."""
    method: Callable[[AnyConfig], list[tuple[str, Pairs]]]
    """Title -> lines: the algorithm, the data, the batches."""
    absent_actors: Callable[[AnyConfig], Pairs]
    """Actors that the run does not have, each with the reason."""
    experts: Callable[[AnyConfig, ModelShape], Pairs]
    """More about the routers of a mixture of experts."""
    weights: Callable[[AnyConfig, ModelShape, Device], Pairs]
    """More about who gets the weights."""
    memory: Callable[[AnyConfig, ModelShape, Device], tuple[list[MemoryEstimate], list[str]]]
    """Estimates, and the models that are not in them. Raises ValueError where one is not here."""
    warnings: Callable[[AnyConfig, list[MemoryEstimate], float], list[str]]
    """What does not fit GPUs that have this many GiB."""
    phases: Callable[
        [AnyConfig, ModelShape, list[MemoryEstimate], float | None], tuple[Pairs, list[str]]
    ]
    """Where models take turns on GPUs of this many GiB: each phase, and what the host lacks."""
    to_fit: str
    """What to lower where main memory is too small."""
    looked_at: str
    """What the checks have read and started."""
