"""Signs of life of actors: the driver pings each of them, and kills who does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from ray.exceptions import RayError

from rlsys.actors.silent import PATIENCE_S, explain_silence

if TYPE_CHECKING:
    from rlsys.actors.group import ActorGroup

HEARTBEAT = "heartbeat"
"""Concurrency group of the method that answers: Ray runs it in a thread of its own. So an actor
that computes for long answers, and a process that is stopped does not."""
PINGS_PER_LIMIT = 6
"""Pings within the seconds after which silence counts as death."""
LONGEST_PAUSE_S = 5.0


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


@dataclass(slots=True)
class _Member:
    actor: Any
    ping: ray.ObjectRef | None = None
    silent_s: float = 0.0
    """How long `ping` has been waiting."""
    has_started: bool = False
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
        self._groups: list[tuple[ActorGroup, float]] = []
        self._members: dict[str, _Member] = {}
        self._reasons: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, group: ActorGroup, limit_s: float | None) -> None:
        """Watch the actors of a group, those too that replace others later.

        Args:
            group: its actors are `Alive`, and have started. One that comes later is watched from
                its first answer: before that it loads its model.
            limit_s: seconds of silence after which an actor is killed; None: watch nothing.
        """
        if limit_s is None:
            return
        for name, actor in group.actors.items():
            self._members[name] = _Member(actor, has_started=True)
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
                for name, actor in list(group.actors.items()):
                    self._look_at(name, actor, elapsed_s, limit_s)

    def _look_at(self, name: str, actor: Any, elapsed_s: float, limit_s: float) -> None:
        member = self._members.get(name)
        if member is None or member.actor is not actor:  # it is new
            member = self._members[name] = _Member(actor)
            self._reasons.pop(name, None)
        if member.is_dead:
            return
        if member.ping is None:
            member.ping, member.silent_s = actor.heartbeat.remote(), 0.0
            return
        if not ray.wait([member.ping], timeout=0)[0]:
            member.silent_s += elapsed_s
            if member.has_started and member.silent_s > limit_s:
                silence = explain_silence({name: actor._actor_id.hex()})
                reason = f"it gave no sign of life for {limit_s:g} s"
                self._kill(name, member, reason, details=f"\n{silence.rstrip()}")
            return
        try:
            fault: str | None = ray.get(member.ping, timeout=LONGEST_PAUSE_S)
        except RayError:  # whoever calls it next hears of its death
            member.is_dead = True
            return
        member.ping, member.has_started = None, True
        if fault is not None:
            self._kill(name, member, fault)

    def _kill(self, name: str, member: _Member, reason: str, *, details: str = "") -> None:
        member.is_dead = True
        self._reasons[name] = reason
        self._say(f"note: {name} is killed: {reason}{details}")
        ray.kill(member.actor)  # within 5 s, also a stopped process
