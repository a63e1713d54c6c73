"""Waiting for Ray actors: every wait has a deadline, and every failure names who failed at what."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlsys.problems import RunFailed
from rlsys.types import Device

CPU_SHARE = 0.01
"""Of Ray's bookkeeping: policy, rollout and reference take turns on the same cores."""
START_TIMEOUT_S = 1800.0
"""For models to be loaded, and on GPUs to be compiled for the first time."""
DEATH_NOTICE_S = 5.0
"""When an actor dies, those that talk with it raise, at times before Ray knows of the death."""

_INHERITED = ("CUDA_", "HF_", "NCCL_", "NVTE_", "PYTORCH_", "TORCH_", "VLLM_")

Place = Callable[[int], dict[str, Any]]
"""The Ray options of an actor, by its rank in its group; see rlsys.actors.placement."""


def on_cpu(rank: int) -> dict[str, Any]:
    """The `Place` of actors that use no GPU."""
    return {"num_cpus": CPU_SHARE, "num_gpus": 0}


class ActorFailure(RunFailed):
    """An actor died or raised; the message ends with who it was and what it was doing."""


class ActorDeath(ActorFailure):
    """An actor's process ended."""


class PhaseTimeout(RunFailed, TimeoutError):
    """A phase did not finish in time; the message names the actors still at it."""


def get_all(
    refs: Mapping[str, ray.ObjectRef],
    *,
    phase: str,
    timeout_s: float,
    on_done: Callable[[str], None] | None = None,
) -> list[Any]:
    """The results of `refs` (actor name -> reference), in order.

    Fails as soon as any of them fails, not when its turn comes: the other ranks of a collective
    would wait for a dead one until their own deadline.

    Args:
        refs: what to wait for.
        phase: what the actors do, for messages.
        timeout_s: seconds for all of them together.
        on_done: called with the name of each actor that has finished.

    Raises:
        ActorFailure: an actor raised or died (ActorDeath), with its own traceback.
        PhaseTimeout: some were not done after `timeout_s` seconds.
    """
    names = {ref: name for name, ref in refs.items()}
    results: dict[ray.ObjectRef, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(names):
        pending = [ref for ref in names if ref not in results]
        done, _ = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            waiting = ", ".join(names[ref] for ref in pending)
            raise PhaseTimeout(
                f"{phase} did not finish within {timeout_s:g} s; still waiting for {waiting}"
            )
        for ref in done:
            try:
                results[ref] = get_one(ref, name=names[ref], phase=phase)
                if on_done is not None:
                    on_done(names[ref])
            except ActorFailure:
                others = {other: names[other] for other in pending if other != ref}
                _raise_death(others, phase=phase)
                raise
    return [results[ref] for ref in refs.values()]


def _raise_death(names: Mapping[ray.ObjectRef, str], *, phase: str) -> None:
    """Raise ActorDeath if that is why another actor failed; hear what the others raise."""
    refs = list(names)
    done = ray.wait(refs, num_returns=len(refs), timeout=DEATH_NOTICE_S)[0] if refs else []
    for ref in done:
        try:
            get_one(ref, name=names[ref], phase=phase)
        except ActorDeath:
            raise
        except ActorFailure:
            pass  # Ray would print what nobody asked for, after the error that matters


def get_one(ref: ray.ObjectRef, *, name: str, phase: str) -> Any:
    """The result of a finished reference, its failure told as that of actor `name` in `phase`."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        # The remote traceback is the message; Ray's own frames around it help nobody.
        raise ActorFailure(f"{error}\n{name} failed in {phase}: {error.cause!r}") from None
    except RayActorError as error:
        text = str(error).rstrip()
        if error.actor_init_failed:  # `text` is the traceback: what was raised is told last
            reason = text.rpartition("\n")[2]
            raise ActorDeath(f"{text}\n{name} failed in {phase}: {reason}") from None
        raise ActorDeath(f"{text}\n{name} died in {phase}") from None
    except RayError as error:
        raise ActorFailure(f"{error}\n{name} was lost in {phase}") from error


def device_env(device: Device) -> dict[str, str]:
    """Variables that hide the GPUs of a host from the actors of a run on CPU."""
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}


def inherited_env() -> dict[str, str]:
    """The variables of this process that libraries in an actor are to see.

    An actor inherits from its node, which may be another host. CUDA_VISIBLE_DEVICES is left out:
    Ray has read it, and gives each actor its own.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_INHERITED) and name != "CUDA_VISIBLE_DEVICES"
    }
