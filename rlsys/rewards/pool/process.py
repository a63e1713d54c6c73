"""A reward process: a plain Python program with the reward functions in its main thread.

User code finds there what it finds in a script: signals, and processes of its own (fork or spawn).
`rlsys rewards try` starts such processes itself, a run from a Ray actor on the node.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from rlsys.rewards.pool.runner import ProcessSettings, RewardRunner, Task, kill_group

_START = """
import json, sys
sys.path[:], fd = json.loads(sys.argv[1]), int(sys.argv.pop())
sys.argv[:] = [""]
from rlsys.rewards.pool.process import serve
serve(fd)
"""
_EXIT_S = 5.0
"""Wait for the exit code of a process that closed its pipe."""


class Died:
    """What a call comes to whose process ended."""

    def __init__(self, why: str):
        self.why = why


class RewardProcess:
    """The side of a reward process that sends tasks. Two threads do it: neither side ever blocks.

    Calls are numbered from 0, which is the start: its result is that of `RewardRunner.start`.
    """

    def __init__(
        self,
        settings: ProcessSettings,
        on_result: Callable[[int, Any], None],
        *,
        concurrent: bool,
    ):
        """Start the process.

        Args:
            settings: what it runs, and how.
            on_result: called in a thread with the number of each call and its result, `Died` when
                the process ended.
            concurrent: whether it takes many tasks at once, of async functions.
        """
        self._on_result = on_result
        self._pipe, theirs = Pipe()
        # The working directory last: a math.py in it is not Python's.
        path = [entry for entry in sys.path if entry] + [os.getcwd()] * ("" in sys.path)
        command = [sys.executable, "-u", "-P", "-c", _START, json.dumps(path), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the leader of a group, which can be killed as one
            )
        self.pid = self._process.pid
        self._lock = threading.Lock()
        self._open: set[int] = {0}
        self._num_calls = 1
        self._died: Died | None = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox.put((settings, concurrent))
        for work in (self._send, self._receive):
            threading.Thread(target=work, daemon=True).start()

    def call(self, task: Task) -> int:
        """Send a task; returns the number under which `on_result` hears of it."""
        with self._lock:
            number = self._num_calls
            self._num_calls += 1
            self._open.add(number)
            died = self._died
        self._outbox.put((number, task))
        if died is not None:
            self._finish(number, died)
        return number

    def kill(self) -> None:
        """End it and what it started, whatever they are doing; `on_result` hears no more."""
        with self._lock:
            self._open.clear()
        kill_group(self.pid)
        self._process.wait()
        self._outbox.put(None)

    def _finish(self, number: int, result: Any) -> None:
        with self._lock:
            is_open = number in self._open
            self._open.discard(number)
        if is_open:
            self._on_result(number, result)

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._pipe.send(message)
            except OSError:
                return  # it ended: the other thread says so

    def _receive(self) -> None:
        try:
            while True:
                self._finish(*self._pipe.recv())
        except (EOFError, OSError):
            pass
        try:
            code: int | None = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            code = None  # it closed the pipe and goes on
        with self._lock:
            self._died = Died(f"reward process {self.pid} {_ending(code)}")
            waiting = sorted(self._open)
        for number in waiting:
            self._finish(number, self._died)
        self._outbox.put(None)


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its pipe"
    if exit_code < 0:
        return f"was ended by signal {-exit_code}"
    return f"ended with exit code {exit_code}"


# --- the process itself --------------------------------------------------------------------------


def serve(fd: int) -> None:
    """Score tasks until the other end of the pipe is gone."""
    pipe = Connection(fd)
    # In a child of user code, or it would hold the pipe open after the death of this process.
    os.register_at_fork(after_in_child=pipe.close)
    settings, concurrent = pipe.recv()
    runner = RewardRunner()
    pipe.send((0, runner.start(settings)))
    if concurrent:
        asyncio.run(_serve_async(pipe, runner))
        return
    while (message := _next(pipe)) is not None:
        number, task = message
        pipe.send((number, runner.score(task)))


async def _serve_async(pipe: Connection, runner: RewardRunner) -> None:
    """Tasks run together."""
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


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None
