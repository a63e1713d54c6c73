"""Signs of life of actors: the driver pings each of them, and kills who does not answer.

What they say with it is the table of actors, actors.json of the run.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, repeat
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from rlsys.actors.silent import PATIENCE_S, explain_silence, has_process
from rlsys.actors.vitals import Vitals, vitals
from rlsys.files import replacing

HEARTBEAT = "heartbeat"
"""Concurrency group of the method that answers: Ray runs it in a thread of its own. So an actor
that computes for long answers, and a process that is stopped does not."""
PINGS_PER_LIMIT = 6
"""Pings within the seconds after which silence counts as death."""
LONGEST_PAUSE_S = 5.0
FIRST_PAUSES_S = (0.2, 0.5, 1.0)
"""Before the first pings: a table of the actors is there soon."""
UNKNOWN = [field.name for field in fields(Vitals) if field.name != "fault"]
"""What is not known of an actor before its first answer."""
STARTING_FACTOR = 10
"""The limit is longer by this factor while an actor starts: its process begins, which takes long
on a busy machine, and it imports libraries, which may hold Python's lock."""


class Alive:
    """Base of the actors that are watched."""

    concurrency_groups: ClassVar[tuple[str, ...]] = (HEARTBEAT,)
    """Groups of methods with a thread of their own each."""

    @ray.method(concurrency_group=HEARTBEAT)
    def heartbeat(self) -> Vitals:
        """See `find_fault`; subclasses leave this method as it is, with its thread."""
        return vitals(self.find_fault())

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
    restarts: int = 0
    """Actors before it under this name."""
    vitals: Vitals | None = None
    """What its last answer said, which came at `answered`, in unix seconds."""
    answered: float | None = None
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
        table: the file that gets a row for each actor; None writes none.
    """

    def __init__(self, say: Callable[[str], object], table: Path | None = None):
        self._say = say
        self._table, self._table_failed = table, False
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
                many while it starts; None kills nothing.
        """
        for name, actor, is_starting in group.watched():
            self._members[name] = _Member(actor, is_starting)
        self._groups.append((group, math.inf if limit_s is None else limit_s))
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
            for longest_s in chain(FIRST_PAUSES_S, repeat(LONGEST_PAUSE_S)):
                pause_s = min(limit_s for _, limit_s in self._groups) / PINGS_PER_LIMIT
                if self._stop.wait(min(pause_s, longest_s)):
                    return
                now = time.monotonic()
                # A long gap means that this process did not run: answers may have waited meanwhile.
                elapsed_s = min(now - before, 2 * pause_s)
                before = now
                for group, limit_s in list(self._groups):
                    for watched in group.watched():
                        self._look_at(watched, elapsed_s, limit_s)
                self._write_table()
        except Exception as error:
            self._say(f"warning: actors that hang are not noticed from here on: {error!r}")
            raise

    def _look_at(self, watched: Watched, elapsed_s: float, limit_s: float) -> None:
        name, actor, is_starting = watched
        member = self._members.get(name)
        if member is None or member.actor is not actor:  # it is new
            restarts = 0 if member is None else member.restarts + 1
            member = self._members[name] = _Member(actor, is_starting, restarts)
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
            answer: Vitals = ray.get(ping, timeout=LONGEST_PAUSE_S)
        except (GetTimeoutError, ActorUnavailableError):
            member.silent_s += LONGEST_PAUSE_S  # cut off, perhaps for a while only
        except RayError:  # whoever calls it next hears of its death
            member.is_dead = True
        else:
            member.silent_s, member.has_process = 0.0, True
            member.vitals, member.answered = answer, time.time()
            if answer.fault is not None:
                self._kill(name, member, answer.fault)

    def _has_process(self, member: _Member) -> bool:
        member.has_process = member.has_process or has_process(member.actor._actor_id.hex())
        return member.has_process

    def _kill(self, name: str, member: _Member, reason: str, *, details: str = "") -> None:
        member.is_dead = True
        self._reasons[name] = reason
        self._say(f"note: {name} is killed: {reason}{details}")
        ray.kill(member.actor)  # within 5 s, also a stopped process

    def rows(self) -> list[dict[str, Any]]:
        """A row for each actor: role, rank, name, process, device, memory, restarts, last answer.

        Memory is in GiB, times are unix seconds; what is not known is None.
        """
        names = [watched.name for group, _ in list(self._groups) for watched in group.watched()]
        members = ((name, self._members[name]) for name in names if name in self._members)
        return [_row(name, member) for name, member in members]

    def _write_table(self) -> None:
        if self._table is None:
            return
        try:
            with replacing(self._table) as scratch:
                scratch.write_text(json.dumps(self.rows()))
        except OSError as error:
            if not self._table_failed:
                self._say(f"note: {self._table} cannot be written: {error}")
            self._table_failed = True


def _row(name: str, member: _Member) -> dict[str, Any]:
    role, *_, rank = name.split(" ")
    says = member.vitals
    known = {} if says is None else asdict(says)
    known.pop("fault", None)
    return {
        "role": role,
        "rank": int(rank),
        **dict.fromkeys(UNKNOWN),
        **known,
        "restarts": member.restarts,
        "last_heartbeat": member.answered,
        "alive": says is not None and not member.is_dead,
    }
