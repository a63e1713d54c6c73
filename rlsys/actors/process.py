"""What every actor's process does first, the secrets that it gets, and its children that stop."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil
import ray
from ray.experimental import internal_kv

from rlsys.actors.logs import name_lines
from rlsys.log_files import NAME
from rlsys.redact import is_secret
from rlsys.stacks import answer_for_stacks
from rlsys.types import Device

INHERITED = (
    *("FI_", "GLOO_", "NCCL_", "UCX_"),  # of networks
    *("CUDA_", "HF_", "NVTE_", "PYTORCH_", "TORCH_", "VLLM_"),
)
"""How the variables begin that libraries in an actor need."""
_OF_ONE_HOST = ("CUDA_VISIBLE_DEVICES", "VLLM_HOST_IP", "VLLM_LOOPBACK_IP")
_NAMESPACE = b"rlsys"


def inherited_env() -> dict[str, str]:
    """The variables of this process that libraries in an actor need, without secrets.

    An actor inherits from its node, which may be another host. Left out is what is true on one host
    only: addresses, and CUDA_VISIBLE_DEVICES, which Ray has read and sets for each actor.
    """
    return {name: value for name, value in _inherited().items() if not is_secret(name)}


def rank_env(device: Device, threads: int) -> dict[str, str]:
    """Variables of a process that computes with torch and megatron-core."""
    env = {
        "OMP_NUM_THREADS": str(threads),
        # On a core that others need, too, a thread that waits for the others by spinning keeps
        # them from it: steps of two threads on a busy machine took six times as long.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns of every host name without an entry
    }
    if device == "cpu":
        # A rank has a hundred threads. In heaps of malloc for each of them, tensors of many
        # lengths leave pieces that fit nothing later, and that nothing gives back.
        env["MALLOC_ARENA_MAX"] = os.environ.get("MALLOC_ARENA_MAX", "2")
    return env


@contextmanager
def shared_secrets() -> Iterator[None]:
    """Leave the secrets among the inherited variables, such as HF_TOKEN, for this run's actors.

    Ray writes the variables of a `runtime_env` to its logs, which other users of the host can read,
    and shows them on its dashboard. Its key-value store is in the memory of the head. A run that
    fails leaves them there until the cluster ends.
    """
    secrets = {name: value for name, value in _inherited().items() if is_secret(name)}
    if secrets:
        internal_kv._internal_kv_put(_key(), json.dumps(secrets).encode(), namespace=_NAMESPACE)
    yield
    if secrets:
        internal_kv._internal_kv_del(_key(), namespace=_NAMESPACE)


def begin_process() -> None:
    """Take the run's secrets and a name in logs, and write stacks on request.

    The first call of every actor.
    """
    if found := NAME.match(ray.get_runtime_context().get_actor_name() or ""):
        name_lines(found[0])
    answer_for_stacks()
    secrets = internal_kv._internal_kv_get(_key(), namespace=_NAMESPACE)
    os.environ.update(json.loads(secrets or "{}"))


class StoppedProcesses:
    """Finds processes that are stopped, by SIGSTOP or a debugger, and not only for a moment."""

    def __init__(self) -> None:
        self._before: set[psutil.Process] = set()

    def among(self, processes: Iterable[psutil.Process]) -> set[psutil.Process]:
        """The processes that are stopped now and were stopped at the last call."""
        stopped = {one for one in processes if _is_stopped(one)}
        twice, self._before = stopped & self._before, stopped
        return twice


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def _inherited() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(INHERITED) and name not in _OF_ONE_HOST
    }


def _key() -> bytes:
    return f"secrets of job {ray.get_runtime_context().get_job_id()}".encode()
