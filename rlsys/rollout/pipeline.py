"""Requests in, scored groups out: what the engines finish goes to the reward workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from rlsys.actors.reward import RewardWorkers
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import PhaseTimeout
from rlsys.rollout.clock import Clock
from rlsys.types import RolloutGroup, SampleRequest

POLL_S = 0.5
"""Longest wait between two looks at the reward workers, which enforce their own deadlines."""
BACKGROUND_POLL_S = 0.02
"""The same in the background; also the longest that `stop_background` waits."""


class RolloutPipeline:
    """Samples and scores: rewards of finished groups are computed while others are sampled.

    Groups move on only during `wait`, and between `start_background` and `stop_background`. Call
    the other methods only while the background is stopped.
    """

    def __init__(
        self,
        engines: RolloutActors,
        rewards: RewardWorkers,
        *,
        timeout_s: float,
        clock: Clock | None = None,
    ):
        """`clock`: None is the machine's time."""
        self._engines = engines
        self._rewards = rewards
        self._timeout_s = timeout_s
        self._clock = clock or Clock()
        self._wanted: set[int] = set()
        self._scored: list[RolloutGroup] = []
        self._stop: Callable[[], None] | None = None
        """Ends the background; None while it is stopped."""
        self._error: Exception | None = None
        self._idle_s = 0.0
        self._idle_since: float | None = self._clock.monotonic()

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Sample and score groups; their tickets are unique."""
        if not requests:
            return
        if self._idle_since is not None:
            self._idle_s += self._clock.monotonic() - self._idle_since
            self._idle_since = None
        self._wanted.update(request.ticket for request in requests)
        self._engines.submit(requests)

    def give_up(self, tickets: Collection[int]) -> None:
        """Stop sampling and scoring these groups; they are never returned."""
        self._wanted.difference_update(tickets)
        self._engines.abort(tickets)
        self._rewards.forget(tickets)
        self._note_idle()

    def wait(self, what: str, *, done: int, total: int) -> list[RolloutGroup]:
        """The groups that were scored since the last call, at least one.

        Args:
            what, done, total: the phase, its finished groups and all its groups, for errors.

        Raises:
            PhaseTimeout: no group was sampled for `timeout_s`.
            ActorFailure: an engine or a reward worker died or raised.
        """
        last_progress = self._clock.monotonic()
        while not self._scored:
            waits_for_engine = self._engines.bring_back()
            if self._poll(POLL_S) or self._rewards.num_pending or waits_for_engine:
                last_progress = self._clock.monotonic()  # the others have their own deadlines
            elif self._clock.monotonic() - last_progress > self._timeout_s:
                self._engines.restart_silent(
                    PhaseTimeout(
                        f"{self._engines.explain_silence()}{what}: no group finished within "
                        f"rollout.timeout_s = {self._timeout_s:g} s; "
                        f"{done} of {total} groups are done"
                    )
                )
                last_progress = self._clock.monotonic()
        scored, self._scored = self._scored, []
        return scored

    def idle_seconds(self) -> float:
        """Seconds so far in which the engines had nothing to sample."""
        since = self._idle_since
        return self._idle_s + (0.0 if since is None else self._clock.monotonic() - since)

    def start_background(self) -> None:
        """Let groups move on in a thread while the driver does something else."""
        if self._wanted:
            self._stop = self._clock.start(self._poll_until_stopped)

    def stop_background(self) -> None:
        """End the thread, and raise what was raised in it."""
        error = self.close()
        if error is not None:
            raise error

    def close(self) -> Exception | None:
        """End the thread; returns what was raised in it, once."""
        if self._stop is not None:
            self._stop()
            self._stop = None
        error, self._error = self._error, None
        return error

    def _poll_until_stopped(self, is_stopped: Callable[[], bool]) -> None:
        try:
            while self._wanted and not is_stopped():
                self._poll(BACKGROUND_POLL_S)
        except Exception as error:  # for the driver's thread
            self._error = error

    def _note_idle(self) -> None:
        if self._idle_since is None and not self._engines.num_pending:
            self._idle_since = self._clock.monotonic()

    def _poll(self, timeout_s: float) -> bool:
        """Move every ready group one stage on; returns whether any was sampled."""
        refs = [*self._engines.pending_refs(), *self._rewards.pending_refs()]
        self._clock.wait(refs, timeout_s=timeout_s)
        sampled, scored = self._engines.collect(), self._rewards.collect()
        self._note_idle()
        for group in sampled:
            if group.ticket in self._wanted:
                self._rewards.submit(group)
        for group in scored:
            if group.ticket in self._wanted:
                self._wanted.remove(group.ticket)
                self._scored.append(group)
        return bool(sampled)
