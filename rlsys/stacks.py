"""The Python stacks of a process that does not answer: where every thread waits.

The process writes them itself when a signal asks for them: faulthandler does that also while C
code holds the interpreter, as in a collective, and needs no privileges. They lie in the memory of
the process, in a file without a name that this user's other processes can open: nothing is left
behind, and a full disk or a network file system that hangs does not matter. What cannot answer,
such as a process under SIGSTOP, is read from outside by py-spy, where that is installed and the
system allows it.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rlsys.processes import descendants, state_of

SIGNAL = signal.SIGUSR2
ANSWER_S = 5.0
"""Seconds that a process gets for its answer; it takes milliseconds even on a busy machine."""
_PAUSE_S = 0.05
_NAME = "rlsys-stacks"
_STATES = {
    "T": "is stopped (SIGSTOP, or a debugger)",
    "t": "is stopped by a debugger",
    "D": "waits in the kernel, for a disk, a network file system or a GPU driver",
    "Z": "has ended",
}
"""Why a process does not answer signals, by its state in /proc."""

_file: int | None = None


def answer_for_stacks() -> None:
    """Have this process write its stacks whenever `SIGNAL` arrives; call it first of all."""
    global _file
    if _file is None:
        _file = os.memfd_create(_NAME)
        faulthandler.register(SIGNAL, file=_file, all_threads=True)


@dataclass(frozen=True, slots=True)
class Stacks:
    """What could be learned of one process and its children."""

    text: str
    """The stacks of all threads, a title above each process; empty if none could be read."""
    problem: str
    """Why the process itself cannot write its stacks; empty if it did."""


def read_stacks(pid: int) -> Stacks:
    """The stacks of a process of this host, and of its children that answer.

    Takes `ANSWER_S` for each process that does not answer, and never hangs.
    """
    text, problem = _read_one(pid)
    parts = [text]
    for child in descendants(pid)[1:]:
        if _memory_file(child) is not None:
            text_of_child, problem_of_child = _read_one(child)
            parts.append(text_of_child or f"process {child} {problem_of_child}")
    return Stacks("\n\n".join(filter(None, parts)), problem)


def main_thread(text: str, most_lines: int = 12) -> str:
    """The stack of the main thread of the first process in a text of `read_stacks`, cut."""
    first = text.split("\n\nprocess ")[0]
    thread = first.rpartition("hread 0x")[2].partition("\n")[2]  # the last one
    return "\n".join(thread.splitlines()[:most_lines])


def _read_one(pid: int) -> tuple[str, str]:
    """The stacks of one process, and why it did not write them itself."""
    problem = _STATES.get(state_of(pid), "")
    if problem:
        problem = f"{problem}, so it cannot write its stacks"
    else:
        file = _memory_file(pid)
        text = "" if file is None else _ask(pid, file)
        if text:
            return f"process {pid}, {_command(pid)}\n{text.rstrip()}", ""
        problem = f"did not write its stacks within {ANSWER_S:g} s"
        if file is None:
            problem = "has ended" if not state_of(pid) else "has not come to writing stacks yet"
    seen = _py_spy(pid)
    return (f"process {pid}, which {problem}, as py-spy sees it\n{seen}" if seen else ""), problem


def _ask(pid: int, file: Path) -> str:
    """Send the signal, and wait until its handler has returned; empty without an answer."""
    try:
        before, blocking = file.stat().st_size, _blocking(pid)
        os.kill(pid, SIGNAL)
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
            if file.stat().st_size > before and _blocking(pid) <= blocking:
                break
        return file.read_bytes()[before:].decode(errors="replace")
    except OSError:  # it ended meanwhile
        return ""


def _blocking(pid: int) -> set[str]:
    """The threads of a process that block the signal, as one does while it handles it."""
    found = set()
    for file in Path(f"/proc/{pid}/task").glob("*/status"):
        try:
            mask = file.read_text().partition("SigBlk:")[2].split()[0]
        except (OSError, IndexError):  # it ended
            continue
        if int(mask, 16) >> (SIGNAL - 1) & 1:
            found.add(file.parent.name)
    return found


def _memory_file(pid: int) -> Path | None:
    """The file of `answer_for_stacks`; without one the signal would end the process."""
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(entry).startswith(f"/memfd:{_NAME}"):
                return entry
    except OSError:  # it ended, or belongs to another user
        pass
    return None


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return b" ".join(words).decode(errors="replace").strip()[:100]


def _py_spy(pid: int) -> str:
    """The stacks as py-spy reads them from a process that it does not stop; empty without it."""
    beside = Path(sys.executable).with_name("py-spy")  # Ray installs it
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None or not state_of(pid):
        return ""
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
