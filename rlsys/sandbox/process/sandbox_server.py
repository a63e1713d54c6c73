"""The helper process of the sandbox, a script that is started with `python -I -S`.

It forks a child for each program and never touches the program's input or output: it hands their
file descriptors on. What programs may do:

- Landlock, for this process and all children: read Python's standard library and the system's
  shared libraries, no other file; write none. On newer kernels also no TCP and no signals to other
  processes. Without Landlock children open no file and have only the modules imported here.
- seccomp, for each child, a list of allowed calls: no sockets, no new processes, no exec, no
  signals, no ptrace; threads are allowed. Everything else fails with EPERM.
- resource limits: CPU time, address space, file size 0, open files, no core dumps.

Before the first program a probe child tries what must fail, see `probe`. rlsys cannot be imported
here, only the standard library.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import types
from typing import Any

# Started with -I, which leaves the folder of this script out.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from sandbox_calls import run_asserts, serve_calls
from sandbox_restrict import (
    Unavailable,
    end_with,
    limit,
    probe,
    restrict_process,
    restrict_syscalls,
)

sys.path.pop(0)

# Imported here once instead of in every child.
PRELOADED = (
    "array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions",
    "functools", "heapq", "itertools", "math", "operator", "queue", "random", "re", "statistics",
    "string", "threading", "time", "typing",
)  # fmt: skip
# Imported too where programs cannot open files.
PRELOADED_FOR_ALL = (
    "abc", "base64", "binascii", "calendar", "cmath", "contextlib", "enum", "fnmatch", "graphlib",
    "hashlib", "hmac", "html", "inspect", "io", "json", "numbers", "pickle", "pprint", "secrets",
    "struct", "textwrap", "timeit", "traceback", "types", "unicodedata", "uuid", "warnings",
    "weakref", "zlib",
)  # fmt: skip


def main() -> None:
    """Serve the socket whose descriptor is the first argument, until its other end closes."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    restricted = sys.argv[2] == "restricted"
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open("/dev/null", os.O_RDWR)
    try:
        may_open = not restricted or restrict_process()
        for name in () if may_open else PRELOADED_FOR_ALL:
            importlib.import_module(name)
        if restricted:
            probe(may_open=may_open)
    except (Unavailable, OSError) as error:
        control.send(json.dumps({"problem": str(error)}).encode())
        return
    control.send(json.dumps({"ready": os.getpid()}).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 3)
        if not message:
            return
        if message == b"kill":  # too late for the last program
            continue
        job = json.loads(message)
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close()
            try:
                end_with(server)
                _child(job, restricted, may_open, null, *descriptors)
            finally:
                os._exit(1)
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(json.dumps(_wait(pid, control, job["wall_time_s"])).encode())


def _wait(pid: int, control: socket.socket, wall_time_s: float) -> dict[str, Any]:
    """Wait for a child; kill it when its time is over or the other side asks or is gone."""
    descriptor = os.pidfd_open(pid)
    watched: list[Any] = [descriptor, control]
    ready, _, _ = select.select(watched, [], [], wall_time_s)
    in_time = descriptor in ready
    if control in ready:
        control.recv(16)  # "kill", or nothing if the reward's process is gone
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(descriptor)
    return {
        "exit_code": os.waitstatus_to_exitcode(status),
        "in_time": in_time or control in ready,
    }


def _child(
    job: dict[str, Any],
    restricted: bool,
    may_open: bool,
    null: int,
    program: int,
    input_: int,
    output: int,
) -> None:
    """Become the program; never returns."""
    os.setpgid(0, 0)
    text = _read_all(program)
    talks = job["mode"] != "stdio"
    for target, source in ((0, input_), (1, output), (2, null)):
        os.dup2(null if talks else source, target)
    if talks:
        # Through copies, as 3 and 4 may be one of the two.
        high = [os.dup(descriptor) for descriptor in (input_, output)]
        for target, source in zip((3, 4), high, strict=True):
            os.dup2(source, target)
    os.closerange(5 if talks else 3, 4096)
    limit(job)
    if restricted:
        restrict_syscalls(may_open=may_open)
    if job["mode"] == "asserts":
        return run_asserts(text, 3, 4)
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["solution.py"]
    code = 0
    try:
        if talks:
            # Not __main__: such programs are called and read no input.
            module.__name__ = "solution"
        exec(compile(text, "solution.py", "exec", dont_inherit=True), module.__dict__)
        if talks:
            serve_calls(module.__dict__, 3, 4)
        _finish()
    except SystemExit as end:
        _finish()
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code = 1
    # The interpreter's own exit would take five times as long as starting this child.
    os._exit(code & 0xFF)


def _finish() -> None:
    """Do what an interpreter does at exit: wait for threads, run exit functions, flush."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if sys.__stdout__ is not None:
        sys.__stdout__.flush()


def _read_all(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode()


if __name__ == "__main__":
    main()
