"""What an actor says about itself with each sign of life."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray

from rlsys.processes import descendants


@dataclass(frozen=True, slots=True)
class Vitals:
    """A sign of life."""

    fault: str | None
    """Why the actor will never work again, or None."""
    name: str | None = None
    """In Ray."""
    pid: int = 0
    node: str = ""
    """Name of its host."""
    gpu: str | None = None
    """Its GPUs, "0" or "0,1"; None without any."""
    started: float = 0.0
    """When its process started, in unix seconds."""
    memory_gib: float | None = None
    """Resident memory of its process and of those that it started."""
    gpu_memory_gib: float | None = None
    """Memory in use on its GPUs, by whichever process."""


def vitals(fault: str | None) -> Vitals:
    """Those of this actor; takes about a millisecond, and never raises."""
    gpus = ray.get_gpu_ids()
    return Vitals(
        fault,
        ray.get_runtime_context().get_actor_name(),
        os.getpid(),
        socket.gethostname(),
        ",".join(map(str, gpus)) or None,
        psutil.Process().create_time(),
        _memory_gib(),
        _gpu_memory_gib(list(map(str, gpus))),
    )


def _memory_gib() -> float:
    resident = 0
    for pid in {os.getpid(), *descendants(os.getpid())}:
        with suppress(psutil.Error):
            resident += psutil.Process(pid).memory_info().rss
    return resident / 2**30


def _gpu_memory_gib(gpus: list[str]) -> float | None:
    """None without GPUs, or where NVIDIA's library does not say."""
    from ray._private.thirdparty import pynvml

    if not gpus:
        return None
    try:
        pynvml.nvmlInit()
        used = 0
        for gpu in gpus:
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(gpu))
                if gpu.isdecimal()
                else pynvml.nvmlDeviceGetHandleByUUID(gpu.encode())
            )
            used += pynvml.nvmlDeviceGetMemoryInfo(handle).used
    except pynvml.NVMLError:
        return None
    return used / 2**30
