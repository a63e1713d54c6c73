"""Whether rollout engines can quantise weights (rollout.quantization). Imports no vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.problems import Problem
from rlsys.types import Device

if TYPE_CHECKING:
    from rlsys.config import Config

FP8_CAPABILITY = (8, 9)
"""CUDA compute capability of the first GPUs that multiply in FP8 (Ada; Hopper is 9.0)."""


def quantization_problem(
    config: Config, *, device: Device, capability: tuple[int, int] | None
) -> Problem | None:
    """What keeps the engines of a run from `rollout.quantization`; None if nothing does.

    Args:
        device: where they run.
        capability: CUDA's compute capability of the GPUs; None if it is not known, or on CPU.
    """
    rollout = config.rollout
    if rollout.quantization is None:
        return None
    setting = f"rollout.quantization = {rollout.quantization}"
    if device == "cpu":
        return Problem(
            f"{setting} needs GPUs that multiply in FP8, and this run is on the CPU: leave it out"
        )
    if config.model_dtype(on_cpu=False) != "bfloat16":
        return Problem(
            f"{setting} quantises weights in bfloat16, and model.dtype is {config.model.dtype}: "
            "set model.dtype to bfloat16, or leave quantization out"
        )
    if capability is not None and capability < FP8_CAPABILITY:
        have, first = (".".join(map(str, value)) for value in (capability, FP8_CAPABILITY))
        return Problem(
            f"{setting}: GPUs of compute capability {have} do not multiply in FP8, which begins at "
            f"{first}: leave it out",
            only_here=True,
        )
    return None
