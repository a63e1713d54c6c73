"""Options of rollout engines that need a kind of device: quantization, drafts. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem
from rlsys.types import Device

if TYPE_CHECKING:
    from rlsys.config import Config

FP8_CAPABILITY = (8, 9)
"""CUDA compute capability of the first GPUs that multiply in FP8 (Ada; Hopper is 9.0)."""


def engine_option_problems(
    config: Config, *, device: Device, capability: tuple[int, int] | None
) -> Iterator[Problem]:
    """What the engines of a run cannot do where they run, and what to do about it.

    Args:
        device: where they run.
        capability: CUDA's compute capability of the GPUs; None if it is not known, or on CPU.
    """
    if config.rollout.quantization is not None:
        yield from _quantization(config, device, capability)
    if config.rollout.speculative_config is not None and device == "cpu":
        # `_expand_kernel_impl` in vllm/utils/cpu_triton_utils.py fills a copy of its output.
        yield Problem(
            "rollout.speculative_config is for GPUs: on the CPU vLLM (0.32) divides the logits of "
            "drafts by a temperature that it never writes there, so completions and log-probs "
            "would be wrong. Leave it out"
        )


def _quantization(
    config: Config, device: Device, capability: tuple[int, int] | None
) -> Iterator[Problem]:
    setting = f"rollout.quantization = {config.rollout.quantization}"
    if device == "cpu":
        yield Problem(
            f"{setting} needs GPUs that multiply in FP8, and this run is on the CPU: leave it out"
        )
    elif config.model_dtype(on_cpu=False) != "bfloat16":
        yield Problem(
            f"{setting} quantises weights in bfloat16, and model.dtype is {config.model.dtype}: "
            "set model.dtype to bfloat16, or leave quantization out"
        )
    elif capability is not None and capability < FP8_CAPABILITY:
        have, first = (".".join(map(str, value)) for value in (capability, FP8_CAPABILITY))
        yield Problem(
            f"{setting}: GPUs of compute capability {have} do not multiply in FP8, which begins at "
            f"{first}: leave it out",
            only_here=True,
        )
