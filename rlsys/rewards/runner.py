"""What runs inside a reward process: the reward functions, and its guard."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rlsys.config import RewardConfig
from rlsys.rewards.base import TrainerState
from rlsys.rewards.instances import Params, RewardError
from rlsys.rewards.plugins import load_plugins
from rlsys.rewards.scoring import Reward, reward_columns
from rlsys.types import RolloutGroup

MEMORY_SHARE = 0.25
"""Of the machine's memory: the limit of a process for which none is set."""
_OWN_FILES = tuple(str(Path(__file__).with_name(name)) for name in ("scoring.py", "base.py"))
"""Frames of these are rlsys calling the user's code."""


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """What a reward process is started with."""

    names: Sequence[str]
    """The functions that it runs."""
    params: Mapping[str, Params]
    known: Params
    """Values of the run for parameters of these names."""
    plugins: Sequence[str]
    """Paths of files."""
    directory: str
    """Working directory of the run, from which paths start. A process on another machine may lack
    it; then it stays in its own, which in a Ray job is a copy of it."""
    max_memory_mb: int | None
    """MiB; None is `MEMORY_SHARE` of the machine's."""


def process_settings(config: RewardConfig, known: Params) -> ProcessSettings:
    """Those of a run whose working directory is that of this process."""
    return ProcessSettings(
        config.names,
        config.params,
        known,
        config.external_plugins,
        os.getcwd(),
        config.max_memory_mb,
    )


@dataclass(frozen=True, slots=True)
class Task:
    """One reward function on some completions of one prompt."""

    name: str
    group: RolloutGroup
    state: TrainerState
    timeout_s: float
    """Async functions are cancelled after it; others are killed from outside."""


@dataclass(frozen=True, slots=True)
class Values:
    """What a task came to."""

    values: list[float]
    """One per completion; NaN for None."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A task without values. Told as text: user's exceptions may not survive pickling."""

    kind: Literal["timeout", "error"]
    report: str
    """The traceback of the user's own code, then one line that sums it up."""
    splittable: bool = False
    """Whether one of the completions alone may be the reason."""


class RewardRunner:
    """The reward functions of this process."""

    def start(self, settings: ProcessSettings) -> Failed | None:
        """Load the plugins and instantiate the functions; what goes wrong comes back as text."""
        _lead_a_group()
        self._guard = start_guard(settings.max_memory_mb)
        if Path(settings.directory).is_dir():
            os.chdir(settings.directory)
        try:
            load_plugins(settings.plugins)
            self._rewards = {
                name: Reward(name, settings.params.get(name), settings.known)
                for name in settings.names
            }
        except ValueError as error:
            return Failed("error", report_of(error))
        return None

    def score(self, task: Task) -> Values | Failed:
        """Run a task of a function that is not async."""
        start = time.perf_counter()
        try:
            values = self._rewards[task.name].score(*_inputs(task))
        except RewardError as error:
            return _failed(error)
        return Values(values, time.perf_counter() - start)

    async def score_async(self, task: Task) -> Values | Failed:
        """Run a task of an async function, for at most its time limit."""
        start = time.perf_counter()
        call = self._rewards[task.name].score_async(*_inputs(task))
        try:
            values = await asyncio.wait_for(call, task.timeout_s)
        except RewardError as error:
            return _failed(error)
        except TimeoutError:
            return Failed("timeout", "cancelled", splittable=True)
        return Values(values, time.perf_counter() - start)


def _inputs(task: Task) -> tuple[dict[str, Any], str]:
    return reward_columns(task.group, task.state), task.group.prompt.prompt_id


def _failed(error: RewardError) -> Failed:
    return Failed("error", report_of(error), splittable=error.__cause__ is not None)


def report_of(error: ValueError) -> str:
    """The user's own traceback, if there is one, and the message of `error` below it."""
    cause = error.__cause__
    if cause is None or cause.__traceback__ is None:
        return str(error)
    frames: TracebackType | None = cause.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in _OWN_FILES:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(cause), cause, frames)) + f"\n{error}"


def _lead_a_group() -> None:
    """Make this process the leader of a group, so that what user code starts can end with it."""
    if os.getpgrp() != os.getpid():  # Ray may have done it
        os.setsid()


def kill_group(pid: int | None) -> None:
    """Kill a reward process and what it started, if it has come so far as to lead a group."""
    try:
        if pid is not None and os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended before; its guard sees to the rest


_GUARD = """
import os, signal, sys, time
pid, parent, limit = map(int, sys.argv[1:])
page = os.sysconf("SC_PAGE_SIZE")
while os.getppid() == pid:
    try:
        with open(f"/proc/{pid}/statm") as file:
            size = int(file.read().split()[1]) * page
        with open(f"/proc/{pid}/stat") as file:
            its_parent = int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        break
    if size > limit:
        print(f"reward process {pid} was killed: it holds {size >> 20} MiB, more than "
              f"reward.max_memory_mb = {limit >> 20}", file=sys.stderr, flush=True)
        break
    if its_parent != parent:
        break
    time.sleep(0.05)
try:
    os.killpg(pid, signal.SIGKILL)
except ProcessLookupError:
    pass
"""
"""Its own process, because code that never lets go of the interpreter stops every thread here."""


def start_guard(max_memory_mb: int | None) -> subprocess.Popen[bytes] | None:
    """Have the group of this process, its leader, killed when it holds more memory, on Linux.

    Also when this process ends, for whatever reason, and when its parent does, which can no longer
    kill it then.

    A limit of the address space would be simpler, but torch and others reserve far more than they
    use; and the kernel's own killer would take the process that is largest, the driver perhaps.

    Args:
        max_memory_mb: MiB that this process may hold, see `ProcessSettings`.
    """
    if not Path("/proc/self/statm").exists():
        return None
    limit = (max_memory_mb or 0) << 20
    if max_memory_mb is None:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = int(machine * MEMORY_SHARE)
    assert os.getpgrp() == os.getpid(), "the guard kills the whole group"
    numbers = [str(number) for number in (os.getpid(), os.getppid(), limit)]
    command = [sys.executable, "-S", "-E", "-c", _GUARD, *numbers]
    # In a session of its own, as it must outlive the group.
    return subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
