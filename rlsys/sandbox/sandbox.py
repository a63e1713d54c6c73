"""Runs untrusted programs in a helper process; process/ says what they may do.

The expected results, which a program must not know, never leave this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

_log = logging.getLogger(__name__)

Mode = Literal["stdio", "calls", "asserts"]

START_S = 120.0
"""For the helper process to start, and to try what programs must not be able to do."""
GRACE_S = 30.0
"""The helper process ends a program in time; this much later it is taken to hang itself."""
_EXIT_S = 5.0
_SERVER = Path(__file__).with_name("process") / "sandbox_server.py"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class SandboxUnavailable(ValueError):
    """This host cannot restrict programs."""


class SandboxEnded(Exception):
    """The program ended, or was stopped, before it answered."""


class OutOfTime(SandboxEnded):
    """The program ran out of time and was stopped."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one run of a program."""

    cpu_time_s: float
    """Seconds of CPU time, all threads together."""
    memory_mib: int
    """MiB of address space; the interpreter itself takes about 30."""
    output_kib: int
    """KiB of standard output, or of the answer to one call."""

    @property
    def wall_time_s(self) -> float:
        """Seconds of wall time: many, as the machine may be busy."""
        return 5.0 + 4 * self.cpu_time_s


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended."""

    output: bytes
    """Standard output, cut at the limit."""
    exit_code: int
    """Negative: the signal that ended it, such as -9, or -27 at the end of its CPU time."""
    within_limits: bool
    """False if it was stopped for its time or its output."""
    out_of_time: bool


class Sandbox:
    """Runs one program at a time, each from a fresh state.

    A helper process that is found dead is replaced; if it dies while a program runs, that is a
    RuntimeError and not a verdict on the program.

    Example:
        sandbox = Sandbox(Limits(cpu_time_s=2, memory_mib=512, output_kib=64))
        sandbox.run("print(int(input()) + 1)", "41").output   # b"42\\n"
    """

    def __init__(self, limits: Limits, *, restricted: bool = True):
        """Start the helper process.

        Raises:
            SandboxUnavailable: this host cannot restrict programs.
        """
        self.limits = limits
        self._restricted = restricted
        self._lock = threading.Lock()
        self._start()

    def run(self, program: str, stdin: str) -> Finished:
        """Run `program` with `stdin` as standard input until it ends or is stopped.

        Raises:
            RuntimeError: the helper process died, or does not answer.
        """
        with self._lock, self._started("stdio", program, stdin.encode()) as running:
            output, verdict = running.read_until_end()
            return Finished(
                output, verdict["exit_code"], verdict["in_time"], running.is_out_of_time()
            )

    @contextlib.contextmanager
    def talk(self, program: str, mode: Mode) -> Iterator[Running]:
        """Run `program` and exchange JSON lines with it; the end of the block stops it.

        Raises:
            OutOfTime: the block raised SandboxEnded because the program ran out of time.
        """
        with self._lock, self._started(mode, program, None) as running:
            try:
                yield running
            except SandboxEnded:
                running.stop()
                if running.is_out_of_time():
                    raise OutOfTime from None
                raise

    def close(self) -> None:
        """End the helper process and what it runs."""
        self._control.close()
        _code(self._process)

    def __del__(self) -> None:
        if "_process" in self.__dict__:
            self.close()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(START_S)  # of every message
        with theirs:
            self._process = subprocess.Popen(
                # -I and -S: no site-packages, no environment variables, no .pth files.
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_SERVER),
                 str(theirs.fileno()), "restricted" if self._restricted else "unrestricted"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={},  # programs see no keys and tokens of this process
                cwd="/",
                start_new_session=True,
            )  # fmt: skip
        try:
            answer = self._control.recv(4096)
        except TimeoutError:
            self.close()
            raise RuntimeError(_silent(START_S)) from None
        problem = json.loads(answer).get("problem") if answer else _ending(self._process)
        if problem:
            raise SandboxUnavailable(f"programs cannot be restricted on this host: {problem}")

    @contextlib.contextmanager
    def _started(self, mode: Mode, program: str, stdin: bytes | None) -> Iterator[Running]:
        job = {
            "mode": mode,
            "cpu_time_s": self.limits.cpu_time_s,
            "wall_time_s": self.limits.wall_time_s,
            "memory_mib": self.limits.memory_mib,
        }
        with contextlib.ExitStack() as stack:
            mine: list[int] = []
            theirs = [_sealed(program.encode(errors="replace"))]
            stack.callback(_close, mine)
            stack.callback(_close, theirs)
            if stdin is None:
                theirs_in, mine_in = os.pipe()
                mine.append(mine_in)
            else:
                theirs_in = _sealed(stdin)
            mine_out, theirs_out = os.pipe()
            mine.insert(0, mine_out)
            theirs += [theirs_in, theirs_out]
            self._send(json.dumps(job).encode(), theirs)
            _close(theirs)
            running = Running(self._control, self._process, mine, self.limits)
            try:
                yield running
            finally:
                # Also after an error here: the next program must not get this one's verdict.
                running.stop()

    def _send(self, job: bytes, descriptors: list[int]) -> None:
        """Send a job to the helper process; replace one that has ended since the last job."""
        try:
            socket.send_fds(self._control, [job], descriptors)
        except ConnectionError:
            _log.warning("%s; another one starts", _ending(self._process))
            self.close()
            self._start()
            socket.send_fds(self._control, [job], descriptors)


class Running:
    """A running program, seen from outside."""

    def __init__(
        self,
        control: socket.socket,
        helper: subprocess.Popen[bytes],
        descriptors: list[int],
        limits: Limits,
    ):
        self._control = control
        self._helper = helper
        self._output, *self._input = descriptors
        self._max_bytes = limits.output_kib * 1024
        self._buffer = b""
        self._killed = False
        self._patience_s = limits.wall_time_s + GRACE_S
        self._deadline = time.monotonic() + self._patience_s
        self._verdict: dict[str, Any] | None = None

    def read_until_end(self) -> tuple[bytes, dict[str, Any]]:
        """All output, and the helper's verdict."""
        open_output = True
        while self._verdict is None:
            ready = self._ready([self._control, *[self._output] * open_output])
            if self._output in ready:
                open_output = self._read()
            if len(self._buffer) > self._max_bytes:
                verdict = self.stop()
                return self._buffer[: self._max_bytes], {**verdict, "in_time": False}
            if self._control in ready:
                self._receive()
        while len(self._buffer) <= self._max_bytes:
            self._ready([self._output])  # a child of a program without restrictions may hold it
            if not self._read():
                break
        assert self._verdict is not None
        in_time = self._verdict["in_time"] and len(self._buffer) <= self._max_bytes
        return self._buffer[: self._max_bytes], {**self._verdict, "in_time": in_time}

    def ask(self, request: str) -> str:
        """Send a line and return the program's next line.

        Raises:
            SandboxEnded: it ended, or answered too much.
        """
        self.send(request)
        return self.next_line()

    def send(self, line: str) -> None:
        """Send a line.

        Raises:
            SandboxEnded: it ended.
        """
        data = memoryview(line.encode() + b"\n")
        os.set_blocking(self._input[0], False)
        while data:
            ready = self._ready([self._control], self._input)
            if self._control in ready:
                raise SandboxEnded
            if ready:
                try:
                    data = data[os.write(self._input[0], data) :]
                except BrokenPipeError:
                    raise SandboxEnded from None

    def next_line(self) -> str:
        """Wait for the program's next line.

        Raises:
            SandboxEnded: it ended, or the line is too long.
        """
        while b"\n" not in self._buffer:
            ready = self._ready([self._output, self._control])
            if self._output in ready:
                if not self._read() or len(self._buffer) > self._max_bytes:
                    raise SandboxEnded
            elif ready:
                raise SandboxEnded
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace")

    def stop(self) -> dict[str, Any]:
        """Kill it if it still runs; returns the helper's verdict."""
        if self._verdict is None:
            # A helper that has answered already would kill the next program.
            ready, _, _ = select.select([self._control], [], [], 0)
            if not ready:
                with contextlib.suppress(ConnectionError):  # `_receive` raises
                    self._control.send(b"kill")
                self._killed = True
            self._receive()
        assert self._verdict is not None
        return self._verdict

    def is_out_of_time(self) -> bool:
        """Whether a program that has ended was stopped for its time."""
        assert self._verdict is not None
        code = self._verdict["exit_code"]
        by_kernel = code == -signal.SIGPROF or (code == -signal.SIGKILL and not self._killed)
        return by_kernel or not self._verdict["in_time"]

    def _ready(self, readers: list[Any], writers: Sequence[int] = ()) -> list[Any]:
        """Which of these are ready; waits for the first, as long as the helper may take."""
        left = max(0.0, self._deadline - time.monotonic())
        readable, writable, _ = select.select(readers, writers, [], left)
        if not readable and not writable:
            self._give_up_helper()
        return [*readable, *writable]

    def _give_up_helper(self) -> NoReturn:
        """End a helper process that hangs, or is stopped; what it runs ends with it."""
        self._helper.kill()
        _code(self._helper)
        self._verdict = {"exit_code": -signal.SIGKILL, "in_time": False}
        raise RuntimeError(_silent(self._patience_s))

    def _receive(self) -> None:
        self._control.settimeout(max(GRACE_S, self._deadline - time.monotonic()))
        try:
            message = self._control.recv(4096)
        except TimeoutError:
            self._give_up_helper()
        except ConnectionResetError:  # it ended before it read all that was sent
            message = b""
        if not message:
            raise RuntimeError(_ending(self._helper)) from None
        self._verdict = json.loads(message)

    def _read(self) -> bool:
        """Read some output; False at its end."""
        data = os.read(self._output, 65536)
        self._buffer += data
        return bool(data)


def _ending(helper: subprocess.Popen[bytes]) -> str:
    """How a helper process that closed its socket ended."""
    code = _code(helper)
    if code < 0:
        return (
            f"the sandbox's helper process was killed by signal {-code}, perhaps because memory "
            "ran out, or by a program that runs with allow_unsandboxed"
        )
    return f"the sandbox's helper process ended with code {code}; see its messages in the log"


def _code(helper: subprocess.Popen[bytes]) -> int:
    """The exit code of a helper process that ends by itself now, or is killed."""
    for _ in range(2):
        try:
            return helper.wait(_EXIT_S)
        except subprocess.TimeoutExpired:  # it is stopped; or else a program that escaped holds it
            helper.kill()
    return -signal.SIGKILL


def _silent(seconds: float) -> str:
    return (
        f"the sandbox's helper process did not answer within {seconds:g} s and was ended: the "
        "machine is very busy, or something has stopped the process (SIGSTOP)"
    )


def _sealed(content: bytes) -> int:
    """The descriptor of a file in memory that its reader cannot change."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
