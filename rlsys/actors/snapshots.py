"""Snapshots of a model's ranks, which outlive their processes: in the memory of Ray's object store.

A rank returns its state, and the driver keeps the reference. So the bytes are in the shared memory
of the rank's node, whoever dies, and Ray frees them with the last reference. While a set is being
taken the one before it stays, and only a whole set replaces it. In a cluster each state is copied
to another node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import ray

from rlsys.actors.keepers import Keepers
from rlsys.actors.waiting import ActorDeath, ActorFailure, PhaseTimeout, get_all
from rlsys.files import size_text
from rlsys.problems import RunFailed

SNAPSHOTS = "snapshots"
"""Concurrency group of the method that takes one: meanwhile the rank may send weights."""
MAX_SHARE_OF_TIME = 0.02
"""Share of a run's time that making snapshots of `auto`, and waiting for them, may take."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank says of the state that it returned."""

    num_bytes: int
    node: str
    """Id of the node that has them."""
    is_finite: bool = True
    """Whether its weights have neither NaNs nor infinities."""
    seconds: float = 0.0
    """In which the rank made it. On a GPU a weight sync that comes meanwhile waits."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The states of all ranks after an update."""

    version: int
    states: dict[str, ray.ObjectRef]
    """Actor name -> its RankState."""


class SnapshotLost(RunFailed):
    """A snapshot cannot be used any more."""

    def __init__(self, version: int, error: ActorFailure):
        super().__init__(
            f"the snapshot of version {version} is lost, so ranks go back to an older state: "
            f"{error.actor}, {error.reason}"
        )


class Snapshots:
    """The newest snapshot of a group, and when the next one is due.

    Args:
        every: updates between two snapshots. 0 takes none. "auto" takes one after each update, or
            so few that making them and waiting for them takes at most MAX_SHARE_OF_TIME.
        clock: seconds; tests have their own.
    """

    def __init__(
        self, every: int | Literal["auto"], *, clock: Callable[[], float] = time.monotonic
    ):
        self._every, self._clock = every, clock
        self.newest: Snapshot | None = None
        self._begun: tuple[Snapshot, dict[str, ray.ObjectRef]] | None = None
        self._due_at = float("-inf")
        self._keepers = Keepers()

    def is_due(self, version: int) -> bool:
        """Whether to take one after the update that made `version`."""
        if self._every == "auto":
            return self._clock() >= self._due_at
        return self._every > 0 and version % self._every == 0

    def begin(self, version: int, refs: Mapping[str, tuple[ray.ObjectRef, ray.ObjectRef]]) -> None:
        """Note that ranks take a snapshot.

        Args:
            refs: actor name -> its state and its Report.
        """
        states = {name: state for name, (state, _) in refs.items()}
        reports = {name: report for name, (_, report) in refs.items()}
        self._begun = Snapshot(version, states), reports

    def settle(self, *, timeout_s: float) -> None:
        """Return when nobody takes a snapshot: ranks may change their state then.

        If a rank died meanwhile, the earlier snapshot stays; whoever calls the rank next says so.
        """
        if self._begun is None:
            return
        (snapshot, refs), self._begun = self._begun, None
        start = self._clock()
        try:
            reports: list[Report] = get_all(refs, phase="snapshot", timeout_s=timeout_s)
        except (ActorDeath, PhaseTimeout):
            return
        except ActorFailure as error:
            self._stop(f"{error.actor} could not take a snapshot ({error.reason})")
            return
        end = self._clock()
        seconds = end - start + max(report.seconds for report in reports)
        self._due_at = end + seconds / MAX_SHARE_OF_TIME
        if not all(report.is_finite for report in reports):
            return  # the earlier one is what to go back to
        self.newest = snapshot
        num_bytes = sum(report.num_bytes for report in reports)
        room = ray.cluster_resources().get("object_store_memory", 0.0)
        if self._every == "auto" and 2 * num_bytes > room:
            self.newest = None
            self._stop(
                f"two snapshots of {size_text(num_bytes)} do not fit in the {size_text(int(room))} "
                "of Ray's object stores (`ray start --object-store-memory` makes them larger)"
            )
            return
        for (name, state), report in zip(snapshot.states.items(), reports, strict=True):
            self._keepers.keep(name, state, node=report.node)

    def forget_begun(self) -> None:
        """Give up what is being taken, by ranks that are ended."""
        self._begun = None

    def _stop(self, reason: str) -> None:
        self._every = 0
        print(
            f"note: {reason}. From here on the run takes none: ranks that fail go back to the "
            "newest checkpoint",
            flush=True,
        )
