"""A reward process, seen from the process that starts it.

The process is a plain Python program with the reward functions in its main thread, so user code
finds what it finds in a script: signals, and processes of its own (fork or spawn). `rlsys rewards
try` starts such processes itself, a run from a Ray actor on the node.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from multiprocessing.connection import Pipe
from typing import Any

from rlsys.rewards.pool.serve import Failed, ProcessSettings, ScoreRequest
from rlsys.stacks import main_thread, read_stacks

_START = """
import json, sys
sys.path[:], fd = json.loads(sys.argv[1]), int(sys.argv.pop())
sys.argv[:] = [""]
from rlsys.rewards.pool.serve import serve
serve(fd)
"""
_EXIT_S = 5.0
"""Wait for the exit code of a process that closed its pipe, or was killed."""


class RewardProcess:
    """Starts a reward process and sends it requests. Two threads do it: neither side ever blocks.

    When the process ends, all that it still had to answer is `Failed` "crashed".
    """

    def __init__(self, settings: ProcessSettings, *, concurrent: bool):
        """Start the process.

        Args:
            settings: what it runs, and how.
            concurrent: whether it runs many requests together, of async functions.
        """
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
        self._lock = threading.Lock()
        self._open: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._ended: Failed | None = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.started = self._ask((settings, concurrent))
        """The result of `RewardRunner.start`."""
        for work in (self._send, self._receive):
            threading.Thread(target=work, daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def score(self, request: ScoreRequest) -> Future[Any]:
        """Send a request; its result is `Scored` or `Failed`."""
        return self._ask(request)

    def whereabouts(self) -> str:
        """The stack of its main thread, in which the functions run."""
        return main_thread(read_stacks(self._process.pid).text)

    def kill(self) -> None:
        """End it and what it started, whatever they are doing; open futures never end."""
        with self._lock:
            self._open.clear()
        with contextlib.suppress(ProcessLookupError):  # it ended before; its guard does the rest
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel holds it; it is dead
            self._process.wait(_EXIT_S)
        self._outbox.put(None)

    def _ask(self, message: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # nobody can cancel it
        with self._lock:
            ended = self._ended
            if ended is None:
                number = next(self._numbers)
                self._open[number] = future
                self._outbox.put((number, message))
        if ended is not None:
            future.set_result(ended)
        return future

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._pipe.send(message)
            except OSError:
                return  # it ended: the other thread says so

    def _receive(self) -> None:
        try:
            while True:
                number, result = self._pipe.recv()
                with self._lock:
                    future = self._open.pop(number, None)
                if future is not None:
                    future.set_result(result)
        except (EOFError, OSError):
            pass
        try:
            code: int | None = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            code = None  # it closed the pipe and goes on
        with self._lock:
            self._ended = Failed("crashed", f"reward process {self._process.pid} {_ending(code)}")
            unanswered = list(self._open.values())
            self._open.clear()
        for future in unanswered:
            future.set_result(self._ended)
        self._outbox.put(None)


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its pipe"
    if exit_code < 0:
        return f"was ended by signal {-exit_code}"
    return f"ended with exit code {exit_code}"


class LocalBackend:
    """A `Backend` whose reward processes are children of this process, without Ray."""

    def __init__(self, settings: ProcessSettings):
        self._settings = settings

    def spawn(
        self, functions: Sequence[str], *, concurrent: bool
    ) -> tuple[RewardProcess, Future[Any]]:
        """Start a process."""
        settings = replace(self._settings, functions=functions)
        process = RewardProcess(settings, concurrent=concurrent)
        return process, process.started

    def score(self, process: RewardProcess, request: ScoreRequest) -> Future[Any]:
        """Send a request."""
        return process.score(request)

    def wait(self, references: Sequence[Future[Any]], timeout_s: float) -> list[Future[Any]]:
        """The references that are done; waits at most `timeout_s` for the first."""
        return list(wait(references, timeout_s, FIRST_COMPLETED).done)

    def result(self, reference: Future[Any]) -> Any:
        """The result of a reference that is done."""
        return reference.result(timeout=0)

    def whereabouts(self, process: RewardProcess) -> str:
        """The stack of its main thread."""
        return process.whereabouts()

    def kill(self, process: RewardProcess) -> None:
        """End a process."""
        process.kill()
