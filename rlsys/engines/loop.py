"""A thread that steps a rollout engine and executes commands between its steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar, cast

from rlsys.types import RolloutGroup, SampleRequest


class SamplingEngine(Protocol):
    """What `EngineLoop` needs of an engine; see VLLMEngine, and ServerEngine without weights."""

    @property
    def has_work(self) -> bool:
        """Whether requests are not finished."""

    def add(self, requests: Sequence[SampleRequest]) -> None:
        """Begin to sample."""

    def step(self) -> list[RolloutGroup]:
        """Sample a little more; returns the groups that this finished."""

    def abort(self, tickets: Iterable[int]) -> None:
        """Give up groups."""


CLOSE_S = 60.0
"""For the step that an engine is at when it is closed."""
E = TypeVar("E", bound=SamplingEngine)
T = TypeVar("T")
Outcome = RolloutGroup | Exception | None
"""How a request ended: with its group, with an error, or with None because it was given up."""


class EngineLoop(Generic[E]):
    """Builds an engine in a new thread, the only one that ever touches it.

    Any thread may call the methods. Commands are executed in their order, between two steps, so a
    weight sync waits for one token and not for the end of a completion.

    Args:
        build: makes the engine. Commands wait for it, and get its errors.
    """

    def __init__(self, build: Callable[[], E]):
        self._commands: SimpleQueue[tuple[Future[Any], Callable[[E], Any]] | None]
        self._commands = SimpleQueue()
        self._on_end: dict[int, Callable[[Outcome], object]] = {}
        """By ticket, for the groups that are being sampled. Only the engine's thread uses it."""
        self._broken: BaseException | None = None
        """Why the engine cannot be used: it was not built, or a step and its clean-up failed."""
        self.built: Future[float] = Future()
        """The seconds that `build` took, or its error."""
        self._thread = threading.Thread(
            target=self._run, args=(build,), name="rollout engine", daemon=True
        )
        self._thread.start()

    def sample(
        self, requests: Sequence[SampleRequest], on_end: Callable[[Outcome], object]
    ) -> None:
        """Begin to sample. `on_end` is called once for each request, in the engine's thread.

        An error of the engine, when it takes the requests or in a later step, is the outcome of
        every group that it was working on. If the engine is broken, all later calls raise that
        error too.
        """

        def add(engine: E) -> None:
            try:
                self._check_usable()
                engine.add(requests)
            except Exception as error:  # raised where the groups are waited for
                for _ in requests:
                    on_end(error)
            else:
                self._on_end.update((request.ticket, on_end) for request in requests)

        self._enqueue(add)

    def abort(self, tickets: Sequence[int]) -> Future[None]:
        """Give up groups; finished ones are ignored."""

        def abort(engine: E) -> None:
            running = [ticket for ticket in tickets if ticket in self._on_end]
            engine.abort(running)
            for ticket in running:
                self._on_end.pop(ticket)(None)

        return self.call(abort)

    def call(self, command: Callable[[E], T]) -> Future[T]:
        """Call `command(engine)` between two steps."""

        def check_and_call(engine: E) -> T:
            self._check_usable()
            return command(engine)

        return self._enqueue(check_and_call)

    def close(self) -> None:
        """Release the engine and end its thread; for tests, a run ends the process."""
        self._commands.put(None)
        self._thread.join(CLOSE_S)

    def _enqueue(self, command: Callable[[E], T]) -> Future[T]:
        future: Future[T] = Future()
        self._commands.put((future, command))
        return future

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _run(self, build: Callable[[], E]) -> None:
        start = time.monotonic()
        try:
            engine = build()
        except BaseException as error:  # raised where the engine is waited for
            self._broken, engine = error, cast(E, None)  # no command gets to it
            self.built.set_exception(error)
        else:
            self.built.set_result(time.monotonic() - start)
        while True:
            while self._broken or not (engine.has_work and self._commands.empty()):
                command = self._commands.get()
                if command is None:
                    return
                _execute(*command, engine)
            self._step(engine)

    def _step(self, engine: E) -> None:
        try:
            finished = engine.step()
        except Exception as error:  # raised where the groups are waited for
            running, self._on_end = self._on_end, {}
            for on_end in running.values():
                on_end(error)
            try:
                engine.abort(running)
            except Exception:  # says less than the error of the step
                self._broken = error
        else:
            for group in finished:
                self._on_end.pop(group.ticket)(group)


def _execute(future: Future[Any], command: Callable[[E], Any], engine: E) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = command(engine)
    except Exception as error:  # raised where the result is read
        future.set_exception(error)
    else:
        future.set_result(result)
