"""Actors that replace others: they load their model while the rest of their group goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray

from rlsys.actors.group import START_TIMEOUT_S
from rlsys.actors.heartbeat import Watched
from rlsys.actors.recovery import Restart
from rlsys.actors.waiting import ActorFailure, all_ready, any_ready, get_one


class Successor(NamedTuple):
    """An actor that has started."""

    name: str
    actor: Any
    restart: Restart
    """Not yet `done`."""


@dataclass(slots=True)
class _Start:
    restart: Restart
    begins_at: float
    actor: Any = None
    ready: ray.ObjectRef | None = None


class Successors:
    """The actors of a group that are on their way.

    Args:
        create: starts an actor of that name.
    """

    def __init__(self, create: Callable[[str], Any]):
        self._create = create
        self._starts: dict[str, _Start] = {}

    def __len__(self) -> int:
        """How many are on their way."""
        return len(self._starts)

    def __contains__(self, name: str) -> bool:
        """Whether that one is on its way."""
        return name in self._starts

    def watched(self) -> list[Watched]:
        """Those that have begun to start, which any thread may ask for."""
        starts = list(self._starts.items())
        return [Watched(n, s.actor, is_starting=True) for n, s in starts if s.actor is not None]

    def begin(self, name: str, restart: Restart) -> None:
        """Start an actor of that name once the restart's delay is over."""
        self._starts[name] = _Start(restart, time.monotonic() + restart.delay_s)
        self.start_due()

    def start_due(self) -> None:
        """Start those whose delay is over; end those that do not start within START_TIMEOUT_S."""
        for name, start in self._starts.items():
            since_s = time.monotonic() - start.begins_at
            if start.actor is None and since_s >= 0:
                start.actor = self._create(name)
                start.ready = start.actor.start.remote()
            elif start.actor is not None and since_s > START_TIMEOUT_S:
                ray.kill(start.actor)  # then `ready` is, with an error

    def refs(self) -> list[ray.ObjectRef]:
        """What to wait for: `started` finds something when one of them is ready."""
        return [start.ready for start in self._starts.values() if start.ready is not None]

    def started(self, *, timeout_s: float) -> list[Successor]:
        """Those that have started, once there is one, or after `timeout_s` seconds.

        They are no longer here.

        Raises:
            ActorFailure: one of them could not start; it is no longer here either.
        """
        self.start_due()
        if refs := self.refs():
            any_ready(refs, timeout_s=timeout_s)
        else:
            time.sleep(timeout_s)
        ready = all_ready(refs)
        found = []
        for name, start in list(self._starts.items()):
            if start.ready is not None and start.ready in ready:
                del self._starts[name]
                try:
                    get_one(start.ready, name=name, phase="restart")
                except ActorFailure:
                    ray.kill(start.actor)
                    raise
                found.append(Successor(name, start.actor, start.restart))
        return found
