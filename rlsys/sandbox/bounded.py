"""Calls with a limit on CPU time and memory that the called code cannot escape.

A signal handler waits for a C function such as `99**99**99` or a regular expression to return, and
threads cannot be killed. So the function runs in a helper process, which the kernel ends when its
CPU timer expires.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any, BinaryIO

_log = logging.getLogger(__name__)

_START = "from rlsys.sandbox.bounded import serve; serve()"
_READY = b"ready\n"
_START_S, _EXIT_S = 300.0, 5.0
_WALL_S, _WALL_PER_CPU = 60.0, 60.0
"""CPU time decides over an answer; only a helper that is stopped reaches these limits of time."""
_OUT_OF_RESOURCES = (RecursionError, MemoryError)
_MEMORY_GIB = 4
"""Address space of a helper process."""


class Limit(Enum):
    """The result of a call that did not finish within its limits."""

    EXCEEDED = "exceeded"


class BoundedCalls:
    """A function `module:name` that takes and returns JSON, called in a helper process.

    A reward process is killed by wall time instead, and that costs all completions of
    a job a retry: here one answer's CPU time decides, so a busy machine changes no score.

    The process starts with `start_helpers` or else at the first call, and again after a call that
    exceeded its limits. It ends with this object or with the process that holds it.

    Example:
        match = BoundedCalls("rlsys.rewards.builtin.matching:matches", cpu_limit_s=1.0)
        match("(a+)+b", "a" * 50, "search")   # Limit.EXCEEDED, a second later
    """

    def __init__(self, function: str, *, cpu_limit_s: float):
        self._process: subprocess.Popen[bytes] | None = None
        if not cpu_limit_s > 0:
            raise ValueError(f"the time limit of a reward must be above 0 s, not {cpu_limit_s}")
        self.function = function
        self.cpu_limit_s = cpu_limit_s
        self._is_ready = False
        self._lock = threading.Lock()
        _made.add(self)

    def __call__(self, *args: Any) -> Any:
        """The function's result, or `Limit.EXCEEDED`.

        Raises:
            RuntimeError: the function raised; the message has the exception.
        """
        with self._lock:
            reply = self._ask(json.dumps(args))
        if reply is None:
            _log.warning(
                "%s took more than %g s of CPU time or %d GiB for one completion and was stopped",
                self.function, self.cpu_limit_s, _MEMORY_GIB,
            )  # fmt: skip
            return Limit.EXCEEDED
        if "error" in reply:
            raise RuntimeError(f"{self.function}: {reply['error']}")
        return reply["value"]

    def close(self) -> None:
        """End the helper process."""
        if self._process is not None:
            self._process.kill()
            self._end(self._process)

    def __del__(self) -> None:
        self.close()

    def _ask(self, request: str) -> dict[str, Any] | None:
        """Exchange one request and reply; None if the helper died."""
        if self._process is None:
            self._launch()
        process = self._ready_process()
        line = self._exchange(request.encode() + b"\n", _WALL_S + _WALL_PER_CPU * self.cpu_limit_s)
        if line.endswith(b"\n"):
            return json.loads(line)
        self._end(process)
        if process.returncode not in (-signal.SIGPROF, -signal.SIGKILL, -signal.SIGSEGV):
            raise self._ended(process)
        return None

    def _launch(self) -> None:
        # The helper can import what this process can: sys.path may be Ray's, not the shell's.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        settings = json.dumps([self.function, self.cpu_limit_s])
        self._is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def _ready_process(self) -> subprocess.Popen[bytes]:
        process = self._process
        assert process is not None
        if not self._is_ready and self._exchange(b"", _START_S) != _READY:
            self._end(process)
            raise self._ended(process)
        self._is_ready = True
        return process

    def _exchange(self, request: bytes, timeout_s: float) -> bytes:
        """Send bytes, and wait for a line; what came before the end if the helper ends.

        Raises:
            RuntimeError: neither came in time. The helper is ended.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + timeout_s
        data, line = memoryview(request), b""
        while not line.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            unsent = [process.stdin] if data else []
            ready, can_write, _ = select.select([process.stdout], unsent, [], left)
            if not ready and not can_write:
                process.kill()
                self._end(process)
                raise RuntimeError(
                    f"the helper process of {self.function} did not answer within {timeout_s:g} s "
                    "and was ended: the machine is very busy, or something has stopped the process "
                    "(SIGSTOP)"
                )
            if ready:
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    break
                line += part
            elif can_write:
                try:
                    data = data[os.write(process.stdin.fileno(), data) :]
                except BrokenPipeError:
                    data = data[:0]  # it died; the empty reply says so
        return line

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a helper that ends now, and close its pipes."""
        self._process = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_EXIT_S)

    def _ended(self, process: subprocess.Popen[bytes]) -> RuntimeError:
        return RuntimeError(
            f"the helper process of {self.function} ended with code {process.returncode}; see its "
            "messages in the log above"
        )


_made: weakref.WeakSet[BoundedCalls] = weakref.WeakSet()
"""All of this process."""


def start_helpers() -> None:
    """Start the helper processes of all `BoundedCalls` of this process together.

    Call it before calls whose time is limited, as imports may take seconds, and while no other
    thread makes or calls any.

    Raises:
        RuntimeError: one ended instead of starting.
    """
    waiting = [calls for calls in _made if calls._process is None]
    for calls in waiting:
        calls._launch()
    for calls in waiting:
        calls._ready_process()


def serve() -> None:
    """Main function of the helper process: a line of JSON arguments in, a line of JSON out."""
    function_name, cpu_limit_s = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print
    # A Ctrl-C in a terminal reaches every process; the run ends this one itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _MEMORY_GIB * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    module, _, name = function_name.partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        replies.write(_READY)
        replies.flush()
        for line in sys.stdin.buffer:
            _answer(function, line, cpu_limit_s, replies)
    except BrokenPipeError:
        # The asking process was killed. An ordinary exit would write once more.
        os._exit(0)


def _answer(
    function: Callable[..., Any], line: bytes, cpu_limit_s: float, replies: BinaryIO
) -> None:
    """Call `function` on one line of JSON arguments and write one line of reply.

    Out of CPU time or memory, the process ends.
    """
    # SIGPROF has no handler, so the kernel ends the process, in whatever C code it is.
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        reply = {"value": function(*json.loads(line))}
    except _OUT_OF_RESOURCES:
        os.kill(os.getpid(), signal.SIGKILL)
    except Exception as error:  # the caller raises it
        reply = {"error": f"{type(error).__name__}: {error}"}
    signal.setitimer(signal.ITIMER_PROF, 0)
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()
