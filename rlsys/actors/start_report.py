"""What a slow start prints: who is not ready, since when, on which host."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

import ray
from ray._private.state import state as cluster_state
from ray.actor import ActorHandle

FIRST_AFTER_S, EVERY_S = 10.0, 20.0
"""Seconds until the first line, and between lines."""
MOST_NAMES = 6
"""Most names on one line."""


class StartReport:
    """Prints who is not ready, while its `with` block runs and is slow."""

    def __init__(self, *, first_after_s: float = FIRST_AFTER_S, every_s: float = EVERY_S):
        self._first_after_s, self._every_s = first_after_s, every_s
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[float, ActorHandle | None]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def waiting_for(self, who: Mapping[str, ActorHandle] | Iterable[str]) -> None:
        """Add names, with their actors if they have any."""
        now = time.monotonic()
        handles = who if isinstance(who, Mapping) else {}
        with self._lock:
            self._waiting |= {name: (now, handles.get(name)) for name in who}

    def ready(self, name: str) -> None:
        """Remove a name."""
        with self._lock:
            self._waiting.pop(name, None)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(self._every_s)  # it may be asking a cluster that does not answer
        seconds = time.monotonic() - self._start
        if error is None and seconds > self._first_after_s:
            print(f"ready after {seconds:.0f} s", flush=True)

    def _report(self) -> None:
        pause = self._first_after_s
        while not self._ended.wait(pause):
            line = self.line()
            if line and not self._ended.is_set():
                print(line, flush=True)
            pause = self._every_s

    def line(self) -> str:
        """Who is not ready now; empty if everybody is."""
        with self._lock:
            waiting = dict(self._waiting)
        now = time.monotonic()
        parts = [
            f"{name} ({', '.join([f'{now - since:.0f} s', *where(handle)])})"
            for name, (since, handle) in list(waiting.items())[:MOST_NAMES]
        ]
        if len(waiting) > MOST_NAMES:
            parts.append(f"{len(waiting) - MOST_NAMES} more")
        return f"waiting for {', '.join(parts)}" if parts else ""


def where(actor: ActorHandle | None) -> list[str]:
    """The host of an actor, if the cluster has several; or that Ray has not placed it yet."""
    if actor is None:
        return []
    address = cluster_state.actor_table(actor._actor_id.hex()).get("Address", {})
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    # Ray enters a node when it asks it for a process, and a port once the process runs.
    if not address.get("Port") or address["NodeID"] not in hosts:
        free = ray.available_resources().get("CPU", 0)
        return [f"Ray has not placed it: {free:g} CPUs are free"]
    return [f"on {hosts[address['NodeID']]}"] if len(hosts) > 1 else []
