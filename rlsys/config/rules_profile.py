"""Rules about the section `profile`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.schema import RunConfig

NO_GPU_MEMORY = (
    "profile.memory writes what PyTorch allocated on GPUs, and the run is on the CPU: leave it out"
)


def profile_problems(config: RunConfig) -> Iterator[Problem]:
    """Every rule about profiles that `config` breaks."""
    profile = config.profile
    if profile.steps is None:
        if profile.torch or profile.memory:
            name = "torch" if profile.torch else "memory"
            yield Problem(
                f"profile.{name} is for the steps of profile.steps, and that is null: set it, as "
                f"in --profile.steps 5:7, or leave profile.{name} out"
            )
        return
    if config.max_steps is not None and profile.traced[0] > config.max_steps:
        yield Problem(
            f"profile.steps = {profile.steps} begins after the last step: max_steps is "
            f"{config.max_steps}"
        )
    if profile.memory and config.device == "cpu":
        yield Problem(NO_GPU_MEMORY)
    for role in profile.torch:
        if role not in config.profiled_roles:
            allowed = ", ".join(config.profiled_roles)
            yield Problem(
                f"profile.torch names {role}, and the run has no actors of that role; it has "
                f"{allowed}"
            )
