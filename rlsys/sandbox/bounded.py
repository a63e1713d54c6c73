"""Calls with a limit on CPU time and memory that the called code cannot escape.

A signal handler waits for a C function such as `99**99**99` or a regular expression to return, and
threads cannot be killed. So the function runs in a helper process, which the kernel ends when its
CPU timer expires.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any, BinaryIO

_log = logging.getLogger(__name__)

_START = "from rlsys.sandbox.bounded import serve; serve()"
_READY = b"ready\n"
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
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        self.close()

    def _ask(self, request: str) -> dict[str, Any] | None:
        """Exchange one request and reply; None if the helper died."""
        if self._process is None:
            self._launch()
        process = self._ready_process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; the empty reply below says so
        line = process.stdout.readline()
        if line.endswith(b"\n"):
            return json.loads(line)
        process.communicate()
        self._process = None
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
            env={**os.environ, "PYTHONPATH": path},
        )

    def _ready_process(self) -> subprocess.Popen[bytes]:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        if not self._is_ready and process.stdout.readline() != _READY:
            process.communicate()
            self._process = None
            raise self._ended(process)
        self._is_ready = True
        return process

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
