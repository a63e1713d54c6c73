"""How often a run replaces what died: one place limits, counts and reports it for all roles."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.actors.heartbeat import Heartbeats
from rlsys.actors.reservation import lost_node
from rlsys.actors.waiting import ActorFailure, PhaseTimeout
from rlsys.config.schema import RecoveryConfig
from rlsys.problems import RunFailed
from rlsys.text import counted

if TYPE_CHECKING:
    from rlsys.actors.group import ActorGroup

SAME_EVENT_S = 5.0
"""Members that fail within these seconds may have failed together, as on a node that is lost: the
second one is not yet the same failure again."""
LONGEST_DELAY_S = 60.0
REPORT_EVERY_S = 30.0
"""Seconds between lines about a member that does not work again."""


class FailsAgain(RunFailed):
    """A role failed for the second time in the same place."""


@dataclass(slots=True)
class Restart:
    """A restart that has begun."""

    member: str
    delay_s: float
    """Seconds to wait first, see recovery.backoff_s."""
    _done: Callable[[float], None]
    _since: float = field(default_factory=time.monotonic)

    def wait(self) -> None:
        """Wait `delay_s` seconds."""
        time.sleep(self.delay_s)

    def done(self) -> None:
        """Report that the member works again, and count the seconds since the failure."""
        self._done(time.monotonic() - self._since)


def _print(line: str) -> None:
    print(line, flush=True)


class Restarts:
    """The restarts of a run: every role asks here before it replaces an actor.

    Args:
        config: the limits.
        say: prints a line; the note of a restart goes there.
        clock: seconds; tests have their own.
        table: see Heartbeats.
        missing: what a member that does not come back may wait for; empty if nothing is known.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        *,
        say: Callable[[str], object] = _print,
        clock: Callable[[], float] = time.monotonic,
        table: Path | None = None,
        missing: Callable[[], str] = lost_node,
    ):
        self.heartbeats = Heartbeats(say, table)
        self._config, self._say, self._clock, self._missing = config, say, clock, missing
        self._begun: dict[str, float] = {}
        """Members that do not work again yet, and since when."""
        self._closed = threading.Event()
        self._reporter: threading.Thread | None = None
        self._times: dict[str, list[float]] = defaultdict(list)
        """When members of a role failed."""
        self._places: dict[tuple[str, str, int, str], float] = {}
        """When a role failed first in a phase of a step, by the reason too."""
        self._metrics: dict[str, float] = {}

    def watch(self, group: ActorGroup, heartbeat_s: float | None) -> None:
        """Watch the actors of a group, which replaces them with the help of this object.

        Args:
            heartbeat_s: see Heartbeats.watch.
        """
        group.restarts = self
        self.heartbeats.watch(group, heartbeat_s)

    @property
    def enabled(self) -> bool:
        """Whether anything is replaced at all."""
        return self._config.max_restarts > 0

    def begin(
        self, role: str, error: ActorFailure | PhaseTimeout, *, phase: str, step: int
    ) -> Restart:
        """Note that an actor failed and will be replaced; prints one line.

        Args:
            role: "rollout", "policy", "reference" or "teacher", whose limit it counts for.
            error: how the actor failed.
            phase: what the role was doing.
            step: the step that the run is in; with `phase`, the place of the failure.

        Raises:
            ActorFailure, PhaseTimeout: `error` itself, where recovery is off.
            RunFailed: the role was restarted too often, or fails twice in the same place
                (FailsAgain).
        """
        reason = self.reason(error)
        if not self.enabled:
            raise error
        now, config = self._clock(), self._config
        place = (role, phase, step, re.sub(r"\d+", "#", reason))
        first = self._places.setdefault(place, now)
        if now - first > SAME_EVENT_S:
            raise FailsAgain(
                f"{error}\n{error.actor} failed in {phase} of step {step} ({reason}), for the "
                f"second time in this place since the restart of a {role} actor. What it works on "
                "there may be the cause: another restart would not help"
            ) from error
        window_s = 3600 * config.window_hours
        recent = [then for then in self._times[role] if now - then < window_s]
        if len(recent) >= config.max_restarts:
            raise RunFailed(
                f"{error}\n{error.actor} failed in {phase} of step {step} ({reason}) after "
                f"{counted(len(recent), 'restart')} of {role} actors within "
                f"{config.window_hours:g} h, the most that recovery.max_restarts allows"
            ) from error
        self._times[role] = [*recent, now]
        self._count(f"fault/{role}_restarts", 1)
        delay_s = min(config.backoff_s * 2 ** (len(recent) - 1), LONGEST_DELAY_S) if recent else 0.0
        after = f" in {delay_s:g} s" if delay_s else ""
        self._say(
            f"note: {error.actor} failed in {phase} of step {step}: {reason}. Restarting it"
            f"{after}, restart {len(recent) + 1} of {config.max_restarts} within "
            f"{config.window_hours:g} h"
        )
        self._begun.setdefault(error.actor, now)
        if self._reporter is None:
            self._reporter = threading.Thread(target=self._report, daemon=True)
            self._reporter.start()
        return Restart(error.actor, delay_s, partial(self._finish, role, error.actor))

    def reason(self, error: ActorFailure | PhaseTimeout) -> str:
        """Why an actor failed, in a line."""
        return self.heartbeats.reason(error.actor) or error.reason

    def metrics(self) -> dict[str, float]:
        """Restarts and lost seconds of each role since the start; {} before the first failure."""
        return dict(self._metrics)

    def close(self) -> None:
        """Stop watching, before Ray is shut down."""
        self._closed.set()
        self.heartbeats.close()

    def waiting(self) -> str:
        """Who does not work again yet, since when, and what is missing; empty if all do."""
        now, begun = self._clock(), dict(self._begun)
        if not begun:
            return ""
        names = ", ".join(f"{name} ({now - since:.0f} s)" for name, since in begun.items())
        missing = self._missing()
        return f"waiting for {names} to work again" + (f": {missing}" if missing else "")

    def _report(self) -> None:
        while not self._closed.wait(REPORT_EVERY_S):
            if line := self.waiting():
                self._say(line)

    def _finish(self, role: str, member: str, seconds: float) -> None:
        self._begun.pop(member, None)
        self._count(f"fault/{role}_seconds_lost", seconds)
        self._say(f"note: {member} works again, {seconds:.1f} s after its failure was noticed")

    def _count(self, key: str, value: float) -> None:
        self._metrics[key] = self._metrics.get(key, 0.0) + value
