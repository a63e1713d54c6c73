"""A trace of a few steps: spans of all actors, and what torch sees in those that are asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.actors.waiting import get_one
from rlsys.config import RunConfig
from rlsys.config.rules_profile import NO_GPU_MEMORY
from rlsys.files import size_text
from rlsys.problems import RunFailed
from rlsys.timeline.chrome import TorchPart, write_trace
from rlsys.timeline.spans import DRIVER, Role, Span, Timeline
from rlsys.types import Device

if TYPE_CHECKING:
    from rlsys.actors.group import ActorGroup
    from rlsys.engines.profiling import Traced

PINGS = 5
"""Questions for the time of an actor's clock; the one that was answered soonest counts."""


class Profiler:
    """Traces the steps of `profile.steps`, and writes the file when they are over.

    A failure is a note: a profile never ends a run.

    Args:
        config: of the run.
        device: that it computes on.
        groups: the roles that torch may look into.
        timeline: of the run.
        folder: for the files.

    Raises:
        ValueError: memory is to be traced, and the run has no GPU.
    """

    def __init__(
        self,
        config: RunConfig,
        device: Device,
        groups: Mapping[Role, ActorGroup],
        timeline: Timeline,
        folder: Path,
    ):
        profile = config.profile
        if profile.memory and device == "cpu":
            raise ValueError(NO_GPU_MEMORY)
        self._steps, self._operations, self._memory = profile.traced, profile.torch, profile.memory
        self._timeline, self._folder = timeline, folder
        self._groups = {r: g for r, g in groups.items() if profile.memory or r in profile.torch}
        self._spans: list[Span] = []
        self._clocks: dict[str, tuple[float, float]] = {}
        """Actor -> seconds that its clock is ahead of the driver's, and how far that may be off."""
        self._is_tracing = False
        self._seconds = 0.0
        """That starting took."""
        if self._steps:
            timeline.writers.append(self._keep)
            timeline.on_step.append(self._begin_step)

    def _keep(self, spans: Sequence[Span]) -> None:
        self._spans += [span for span in spans if span.step in self._steps]

    def _begin_step(self, step: int | None) -> None:
        """Called before each step, and with None at the end."""
        if step is not None and step in self._steps and not self._is_tracing and not self._spans:
            self._is_tracing = True
            self._seconds = self._timed(self._start)
        elif self._is_tracing and (step is None or step not in self._steps):
            self._is_tracing = False
            self._timed(self._finish)
        elif step is None and not self._spans:
            print(f"note: the run did not reach the steps of profile.steps, {self._shown}")

    def _timed(self, work: Callable[[], None]) -> float:
        start = self._timeline.clock()
        try:
            work()
        except (RunFailed, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            print(f"note: the profile of {self._shown} is not whole: {reason}", flush=True)
        end = self._timeline.clock()
        self._timeline.add(DRIVER, "driver", "profile", start, end)
        return end - start

    @property
    def _shown(self) -> str:
        first, last = self._steps[0], self._steps[-1]
        return f"step {first}" if first == last else f"steps {first} to {last}"

    def _start(self) -> None:
        for role, group in self._groups.items():
            self._clocks |= {name: self._compare(name, a) for name, a in group.actors.items()}
            group.call("start_trace", role in self._operations, self._memory)

    def _compare(self, name: str, actor: Any) -> tuple[float, float]:
        """How far the clock of an actor's host is ahead, from the fastest of a few pings."""
        found = []
        for _ in range(PINGS):
            before = self._timeline.clock()
            there = get_one(actor.clock.remote(), name=name, phase="comparing clocks")
            after = self._timeline.clock()
            found.append(((after - before) / 2, there - (before + after) / 2))
        uncertain, ahead = min(found)
        return (ahead if abs(ahead) > uncertain else 0.0), uncertain

    def _finish(self) -> None:
        start = self._timeline.clock()
        name = f"steps-{self._steps[0]}-{self._steps[-1]}"
        parts: list[TorchPart] = []
        memory: list[Path] = []
        try:
            for role, group in self._groups.items():
                traced = group.call("stop_trace", self._folder, f"{name}-{role}")
                for actor, of_actor in zip(group.actors, traced, strict=True):
                    parts += [part for one in of_actor if (part := self._part(actor, one))]
                    memory += [one.memory for one in of_actor if one.memory is not None]
        finally:  # without what an actor took with it
            path = self._folder / f"{name}.json.gz"
            clocks = {
                actor: {"seconds_ahead": ahead, "uncertain_seconds": uncertain}
                for actor, (ahead, uncertain) in self._clocks.items()
            }
            write_trace(path, self._spans, parts, {"clocks": clocks})
        for part in parts:
            part.path.unlink()  # all of it is in the one trace
        seconds = self._seconds + self._timeline.clock() - start
        size = size_text(path.stat().st_size)
        print(
            f"profile: {self._shown} in {path} ({size}; open it at ui.perfetto.dev); starting and "
            f"writing took {seconds:.1f} s, in no step's time",
            flush=True,
        )
        for snapshot in memory:
            print(f"profile: memory in {snapshot} (open it at pytorch.org/memory_viz)", flush=True)

    def _part(self, actor: str, traced: Traced) -> TorchPart | None:
        if traced.trace is None:
            return None
        ahead, _ = self._clocks.get(actor, (0.0, 0.0))
        at = traced.marked_at - ahead
        return TorchPart(actor, traced.label, traced.trace, at)
