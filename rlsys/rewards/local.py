"""Reward processes as children of this one, without Ray: for `rlsys rewards try` and tests."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from rlsys.rewards.runner import ProcessSettings, RewardRunner, Task, kill_group
from rlsys.rewards.work import ProcessDied


@dataclass(eq=False, slots=True)
class Child:
    """One process and the results that it sent."""

    process: SpawnProcess
    pipe: Connection
    results: dict[int, Any] = field(default_factory=dict)
    num_sent: int = 0
    has_ended: bool = False


Reference = tuple[Child, int]
_SAFE_PATH = "PYTHONSAFEPATH"


class LocalBackend:
    """Reward processes by `multiprocessing`; see `rlsys.rewards.work.Backend`."""

    def __init__(self, settings: ProcessSettings):
        self._settings = settings

    def spawn(self, names: Sequence[str], *, concurrent: bool) -> tuple[Child, Reference]:
        """Start a process."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        target = _serve_async if concurrent else _serve
        settings = replace(self._settings, names=names)
        args = (theirs, settings, os.environ.get(_SAFE_PATH))
        process = context.Process(target=target, args=args, daemon=True)
        with _safe_path():
            process.start()
        theirs.close()
        child = Child(process, ours, num_sent=1)
        return child, (child, 0)

    def score(self, process: Child, task: Task) -> Reference:
        """Send a task."""
        number = process.num_sent
        process.num_sent += 1
        try:
            process.pipe.send((number, task))
        except OSError:
            process.has_ended = True
        return process, number

    def wait(self, references: Sequence[Reference], timeout_s: float) -> list[Reference]:
        """All that are done, at least one unless time is over."""
        pipes = {child.pipe: child for child, _ in references if not child.has_ended}
        if not any(self._is_done(reference) for reference in references):
            wait(list(pipes), timeout_s)
        for child in pipes.values():
            _receive(child)
        return [reference for reference in references if self._is_done(reference)]

    def result(self, reference: Reference) -> Any:
        """Of a reference that is done."""
        child, number = reference
        if number in child.results:
            return child.results.pop(number)
        child.process.join(timeout=5)
        raise ProcessDied(f"reward process {child.process.pid} {_ending(child.process.exitcode)}")

    def kill(self, process: Child) -> None:
        """End a process."""
        kill_group(process.process.pid)
        process.process.kill()
        process.process.join()
        process.pipe.close()

    def _is_done(self, reference: Reference) -> bool:
        child, number = reference
        return number in child.results or child.has_ended


@contextmanager
def _safe_path() -> Iterator[None]:
    """Have Python start without the working directory in sys.path.

    It would stand first, before Python itself, and a math.py in it be Python's math. What this
    process has in sys.path `multiprocessing` hands on later.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        _restore_safe_path(before)


def _restore_safe_path(value: str | None) -> None:
    if value is None:
        del os.environ[_SAFE_PATH]
    else:
        os.environ[_SAFE_PATH] = value


def _receive(child: Child) -> None:
    try:
        while child.pipe.poll():
            number, result = child.pipe.recv()
            child.results[number] = result
    except (EOFError, OSError):
        child.has_ended = True


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was ended by signal {-exit_code}"
    return f"ended with exit code {exit_code}"


def _serve(pipe: Connection, settings: ProcessSettings, safe_path: str | None) -> None:
    """The life of a process: one task after another until the other end is gone."""
    _restore_safe_path(safe_path)  # for programs that reward code starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which kills
    runner = RewardRunner()
    pipe.send((0, runner.start(settings)))
    while (message := _next(pipe)) is not None:
        number, task = message
        pipe.send((number, runner.score(task)))


def _serve_async(pipe: Connection, settings: ProcessSettings, safe_path: str | None) -> None:
    """The same for async functions: tasks run together."""
    _restore_safe_path(safe_path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def serve() -> None:
        runner = RewardRunner()
        pipe.send((0, runner.start(settings)))
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Task] | None]()

        def read() -> None:
            while (message := _next(pipe)) is not None:
                loop.call_soon_threadsafe(arrived.put_nowait, message)
            loop.call_soon_threadsafe(arrived.put_nowait, None)

        async def answer(number: int, task: Task) -> None:
            pipe.send((number, await runner.score_async(task)))

        threading.Thread(target=read, daemon=True).start()
        tasks = set()
        while (message := await arrived.get()) is not None:
            tasks.add(task := asyncio.create_task(answer(*message)))
            task.add_done_callback(tasks.discard)

    asyncio.run(serve())


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None
