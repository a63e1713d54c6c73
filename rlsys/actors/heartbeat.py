"""Signs of life of actors: the driver pings each of them, and kills who does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from rlsys.actors.silent import PATIENCE_S, explain_silence, has_process

HEARTBEAT = "heartbeat"
"""Concurrency group of the method that answers: Ray runs it in a thread of its own. So an actor
that computes for long answers, and a process that is stopped does not."""
PINGS_PER_LIMIT = 6
"""Pings within the seconds after which silence counts as death."""
LONGEST_PAUSE_S = 5.0
STARTING_FACTOR = 10
"""An actor that starts may be silent for so many times the limit. Its process begins, which takes
long on a busy machine, and it imports libraries, which may hold Python's lock."""


class Alive:
    """Base of the actors that are watched."""

    concurrency_groups: ClassVar[tuple[str, ...]] = (HEARTBEAT,)
    """Groups of methods with a thread of their own each."""

    @ray.method(concurrency_group=HEARTBEAT)
    def heartbeat(self) -> str | None:
        """See `find_fault`; subclasses leave this method as it is, with its thread."""
        return self.find_fault()

    @ray.method(concurrency_group=HEARTBEAT)
    def clock(self) -> float:
        """Unix seconds of the clock of this actor's host."""
        return time.time()

    def find_fault(self) -> str | None:
        """Why this actor will never work again, or None; called in a thread of its own."""
        return None


class Watched(NamedTuple):
    """An actor that has to give signs of life."""

    name: str
    actor: Any
    is_starting: bool
    """Whether nobody relies on it yet: it loads its model."""


class Group(Protocol):
    """Whose actors are watched."""

    def watched(self) -> Sequence[Watched]:
        """All of them now, those too that replace others; called in the thread of Heartbeats."""


@dataclass(slots=True)
class _Member:
    actor: Any
    is_starting: bool
    ping: ray.ObjectRef | None = None
    silent_s: float = 0.0
    """How long it has not answered."""
    has_process: bool = False
    """Whether Ray has found a place for it, as far as was asked."""
    is_dead: bool = False


class Heartbeats:
    """Pings the actors of the watched groups in a thread, and kills those that are lost.

    Whoever waits for an actor that was killed gets an ActorDeath. Time counts only while this
    process runs: a driver that was stopped itself blames nobody.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], object]):
        self._say = say
        self._groups: list[tuple[Group, float]] = []
        self._members: dict[str, _Member] = {}
        self._reasons: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, group: Group, limit_s: float | None) -> None:
        """Watch the actors of a group, those too that replace others later.

        Args:
            group: its actors are `Alive`.
            limit_s: seconds of silence after which an actor is killed, STARTING_FACTOR times as
                many while it starts; None: watch nothing.
        """
        if limit_s is None:
            return
        self._groups.append((group, limit_s))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
            self._thread.start()

    def reason(self, name: str) -> str | None:
        """Why the last actor of that name was killed here; None if it was not."""
        return self._reasons.get(name)

    def close(self) -> None:
        """End the thread, before Ray is shut down."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        try:
            before = time.monotonic()
            while True:
                pause_s = min(limit_s for _, limit_s in self._groups) / PINGS_PER_LIMIT
                if self._stop.wait(min(pause_s, LONGEST_PAUSE_S)):
                    return
                now = time.monotonic()
                # A long gap means that this process did not run: answers may have waited meanwhile.
                elapsed_s = min(now - before, 2 * pause_s)
                before = now
                for group, limit_s in list(self._groups):
                    for watched in group.watched():
                        self._look_at(watched, elapsed_s, limit_s)
        except Exception as error:
            self._say(f"warning: actors that hang are not noticed from here on: {error!r}")
            raise

    def _look_at(self, watched: Watched, elapsed_s: float, limit_s: float) -> None:
        name, actor, is_starting = watched
        member = self._members.get(name)
        if member is None or member.actor is not actor:  # it is new
            member = self._members[name] = _Member(actor, is_starting)
            self._reasons.pop(name, None)
        if member.is_dead:
            return
        if is_starting != member.is_starting:  # what it was silent while it started is forgiven
            member.is_starting, member.silent_s = is_starting, 0.0
        if member.ping is None:
            member.ping = actor.heartbeat.remote()
            return
        if ray.wait([member.ping], timeout=0)[0]:
            self._take_answer(name, member)
        elif is_starting and not self._has_process(member):
            return  # it waits for resources
        else:
            member.silent_s += elapsed_s
        limit_s *= STARTING_FACTOR if is_starting else 1
        if member.silent_s > limit_s:
            silence = explain_silence({name: actor._actor_id.hex()})
            reason = f"it gave no sign of life for {limit_s:g} s"
            self._kill(name, member, reason, details=f"\n{silence.rstrip()}")

    def _take_answer(self, name: str, member: _Member) -> None:
        ping, member.ping = member.ping, None
        try:
            fault: str | None = ray.get(ping, timeout=LONGEST_PAUSE_S)
        except (GetTimeoutError, ActorUnavailableError):
            member.silent_s += LONGEST_PAUSE_S  # cut off, perhaps for a while only
        except RayError:  # whoever calls it next hears of its death
            member.is_dead = True
        else:
            member.silent_s, member.has_process = 0.0, True
            if fault is not None:
                self._kill(name, member, fault)

    def _has_process(self, member: _Member) -> bool:
        member.has_process = member.has_process or has_process(member.actor._actor_id.hex())
        return member.has_process

    def _kill(self, name: str, member: _Member, reason: str, *, details: str = "") -> None:
        member.is_dead = True
        self._reasons[name] = reason
        self._say(f"note: {name} is killed: {reason}{details}")
        ray.kill(member.actor)  # within 5 s, also a stopped process
