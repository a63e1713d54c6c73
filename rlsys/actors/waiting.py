"""Waiting for Ray actors: every wait has a deadline, and every failure names the actor.

When a deadline passes, the stacks of the actors that are silent are saved and named in the error.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rlsys.actors.silent import actor_of, explain_silence
from rlsys.problems import RunFailed

DEATH_NOTICE_S = 5.0
"""When an actor dies, the actors that talk to it may raise before Ray knows of the death."""
FETCH_S = 300.0
"""For a result that is ready, and has at most to come from another node."""

_TIMEOUT = re.compile(r"time[d ]*out|did not take part within", re.IGNORECASE)
"""In errors of gloo, NCCL, torch's store and weight sync that waited for another rank."""


class ActorFailure(RunFailed):
    """An actor died or raised. The message ends with its name and what it was doing.

    Args:
        message: all of that.
        actor: its name.
        reason: why, in a line.
        cause: what it raised; None if it died.
        silent: the actors that it waited for in vain, if that is what it raised.
    """

    def __init__(
        self,
        message: str,
        *,
        actor: str = "",
        reason: str = "",
        cause: object | None = None,
        silent: tuple[str, ...] = (),
    ):
        super().__init__(message)
        self.actor, self.reason, self.cause, self.silent = actor, reason, cause, silent


class ActorDeath(ActorFailure):
    """An actor's process ended."""


class PhaseTimeout(RunFailed, TimeoutError):
    """A phase did not finish in time. The message names the actors that are still busy, and the
    files with their stacks.

    Args:
        message: all of that.
        actor: their names, as in "policy rank 0, policy rank 1".
        reason: why it is given up, in a line.
    """

    def __init__(self, message: str, *, actor: str = "", reason: str = ""):
        super().__init__(message)
        self.actor, self.reason = actor, reason
        self.silent = tuple(actor.split(", ")) if actor else ()


def get_all(
    refs: Mapping[str, ray.ObjectRef],
    *,
    phase: str,
    timeout_s: float,
    on_done: Callable[[str], None] | None = None,
) -> list[Any]:
    """Wait for all references and return their results in order.

    Fails as soon as one actor fails: the other ranks of a collective would wait for it until their
    own deadline.

    Args:
        refs: actor name -> reference.
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
            silence = explain_silence({names[ref]: actor_of(ref) for ref in pending})
            raise PhaseTimeout(
                f"{silence}{phase} did not finish within {timeout_s:g} s; "
                f"still waiting for {waiting}",
                actor=waiting,
                reason=f"it did not finish within {timeout_s:g} s",
            )
        for ref in done:
            try:
                results[ref] = get_one(ref, name=names[ref], phase=phase)
            except ActorDeath:
                raise  # at once: the others may wait for it until their own deadline
            except ActorFailure as error:
                others = {r: names[r] for r in pending if r != ref}
                _raise_death(others, phase=phase)
                raise _with_silent_peers(error, others) from error.__cause__
            if on_done is not None:
                on_done(names[ref])
    return [results[ref] for ref in refs.values()]


def _raise_death(names: Mapping[ray.ObjectRef, str], *, phase: str) -> None:
    """Raise ActorDeath if the death of one of these actors made another actor fail."""
    pending, deadline = list(names), time.monotonic() + DEATH_NOTICE_S
    while pending and (left_s := deadline - time.monotonic()) > 0:
        ready, pending = ray.wait(pending, timeout=left_s)
        for ref in ready:
            try:
                get_one(ref, name=names[ref], phase=phase)
            except ActorDeath:
                raise
            except ActorFailure:
                pass  # a consequence too; Ray would print it later if nobody took it


def _with_silent_peers(error: ActorFailure, others: Mapping[ray.ObjectRef, str]) -> ActorFailure:
    """An actor that waited in vain for another one names a victim: add where the others are."""
    silent = {others[ref]: actor_of(ref) for ref in others if ref not in all_ready(list(others))}
    if not silent or not _TIMEOUT.search(str(error)):
        return error
    text, _, last_line = str(error).rpartition("\n")
    message = f"{text}\n{explain_silence(silent)}{last_line}"
    return type(error)(
        message, actor=error.actor, reason=error.reason, cause=error.cause, silent=tuple(silent)
    )


def get_one(ref: ray.ObjectRef, *, name: str, phase: str, timeout_s: float = FETCH_S) -> Any:
    """The result of a finished reference.

    Raises:
        ActorFailure: actor `name` failed in `phase`.
        PhaseTimeout: the result did not arrive within `timeout_s` seconds.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise PhaseTimeout(
            f"{explain_silence({name: actor_of(ref)})}{phase}: the result of {name} is ready, "
            f"but did not arrive within {timeout_s:g} s; is its node cut off?",
            actor=name,
            reason=f"its result did not arrive within {timeout_s:g} s",
        ) from None
    except RayTaskError as error:
        # The remote traceback is the message; Ray's own frames around it help nobody.
        reason = repr(error.cause)
        raise ActorFailure(
            f"{error}\n{name} failed in {phase}: {reason}",
            actor=name,
            reason=reason,
            cause=error.cause,
        ) from None
    except RayActorError as error:
        text = str(error).rstrip()
        if error.actor_init_failed:  # `text` is a traceback, which ends with the error
            reason = text.rpartition("\n")[2]
            raise ActorDeath(
                f"{text}\n{name} failed in {phase}: {reason}", actor=name, reason=reason
            ) from None
        raise ActorDeath(
            f"{text}\n{name} died in {phase}", actor=name, reason="its process ended"
        ) from None
    except OutOfMemoryError as error:  # Ray's memory monitor ended the process
        reason = "Ray ended it, because its node was running out of memory"
        raise ActorDeath(f"{error}\n{name} died in {phase}", actor=name, reason=reason) from None
    except RayError as error:
        raise ActorFailure(
            f"{error}\n{name} was lost in {phase}", actor=name, reason="its result was lost"
        ) from error


def any_ready(refs: Sequence[ray.ObjectRef], *, timeout_s: float) -> None:
    """Return when one of the references (or streams) is ready, or after `timeout_s` seconds."""
    ray.wait(list(refs), timeout=timeout_s)


def all_ready(refs: Sequence[ray.ObjectRef], *, timeout_s: float = 0.0) -> list[ray.ObjectRef]:
    """The references (or streams) that are ready after at most `timeout_s` seconds."""
    if not refs:
        return []
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
    return ready
