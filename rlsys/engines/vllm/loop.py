"""A thread that steps a rollout engine and does whatever else is asked of it between steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

from rlsys.types import RolloutGroup, SampleRequest

Outcome = RolloutGroup | Exception | None
"""Of a request: its group, why it failed, or None when it was given up."""


class SteppedEngine(Protocol):
    """What can be sampled from step by step, one token of each sequence at a time."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: sequences that are not finished, and no pause."""

    def add(self, requests: Sequence[SampleRequest]) -> None:
        """Begin to sample; all of them, or none and an error."""

    def step(self) -> list[RolloutGroup]:
        """The groups that the next token finished."""

    def abort(self, group_ids: Iterable[int]) -> None:
        """Give up what is not finished."""


class EngineLoop:
    """Builds an engine in a thread of its own, the only one that ever touches it.

    Any thread may call. What is asked is done in the order in which it was asked, between two
    steps, so a weight sync waits for one token and not for the end of a completion.

    Args:
        build: makes the engine; what it raises is raised here.
    """

    def __init__(self, build: Callable[[], SteppedEngine]):
        self._commands: SimpleQueue[tuple[Future[Any], Callable[[SteppedEngine], Any]] | None]
        self._commands = SimpleQueue()
        self._on_end: dict[int, Callable[[Outcome], None]] = {}
        """Of what is being sampled, by group_id. Touched by the engine's thread alone."""
        self._broken: Exception | None = None
        """Why the engine cannot be used any more: a step failed, and could not be cleaned up."""
        built: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(build, built), name="rollout engine", daemon=True
        )
        self._thread.start()
        built.result()

    def sample(self, requests: Sequence[SampleRequest], on_end: Callable[[Outcome], None]) -> None:
        """Begin to sample. `on_end` is called once a request, in the engine's thread.

        Whatever the engine raises, when it takes the requests or in a later step, is the outcome
        of every group that it was working on. An engine that is broken for good raises that, here
        and in every other call.
        """

        def add(engine: SteppedEngine) -> None:
            try:
                self._check_usable()
                engine.add(requests)
            except Exception as error:  # raised where the groups are waited for
                for _ in requests:
                    on_end(error)
            else:
                self._on_end.update((request.group_id, on_end) for request in requests)

        self._ask(add)

    def abort(self, group_ids: Sequence[int]) -> Future[None]:
        """Give up groups; those that are finished already do not matter."""

        def abort(engine: SteppedEngine) -> None:
            self._check_usable()
            running = [group_id for group_id in group_ids if group_id in self._on_end]
            engine.abort(running)
            for group_id in running:
                self._on_end.pop(group_id)(None)

        return self._ask(abort)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a method of the engine between two steps."""

        def call(engine: SteppedEngine) -> Any:
            self._check_usable()
            return getattr(engine, method)(*args, **kwargs)

        return self._ask(call)

    def close(self) -> None:
        """Let go of the engine and end its thread."""
        self._commands.put(None)
        self._thread.join()

    def _ask(self, command: Callable[[SteppedEngine], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._commands.put((future, command))
        return future

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _run(self, build: Callable[[], SteppedEngine], built: Future[None]) -> None:
        try:
            engine = build()
        except BaseException as error:  # told to whoever waits for the engine
            built.set_exception(error)
            return
        built.set_result(None)
        while True:
            while self._broken or not (engine.has_work and self._commands.empty()):
                asked = self._commands.get()
                if asked is None:
                    return
                _answer(*asked, engine)
            self._step(engine)

    def _step(self, engine: SteppedEngine) -> None:
        try:
            finished = engine.step()
        except Exception as error:  # raised where the groups are waited for
            running, self._on_end = self._on_end, {}
            for on_end in running.values():
                on_end(error)
            try:
                engine.abort(running)
            except Exception:  # less telling than why the step failed
                self._broken = error
        else:
            for group in finished:
                self._on_end.pop(group.group_id)(group)


def _answer(
    future: Future[Any], command: Callable[[SteppedEngine], Any], engine: SteppedEngine
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = command(engine)
    except Exception as error:  # raised where the result is asked for
        future.set_exception(error)
    else:
        future.set_result(result)
