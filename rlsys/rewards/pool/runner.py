"""What runs inside a reward process: the reward functions, and its guard."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from rlsys.config import RewardConfig
from rlsys.plugins.load import load_plugins
from rlsys.rewards.base import TrainerState
from rlsys.rewards.instances import Params, RewardError
from rlsys.rewards.logged import CallLog, Logged
from rlsys.rewards.pool.guard import start_guard
from rlsys.rewards.scoring import Reward, reward_columns
from rlsys.sandbox.bounded import start_helpers
from rlsys.types import RolloutGroup

_OWN_FILES = tuple(str(Path(__file__).parents[1] / name) for name in ("scoring.py", "base.py"))
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
    """MiB, see `start_guard`."""


def process_settings(
    config: RewardConfig, known: Params, plugins: Sequence[str] = ()
) -> ProcessSettings:
    """Those of a run whose working directory is that of this process.

    Args:
        config: of the rewards.
        known: as of `ProcessSettings`.
        plugins: files to load besides those of `config`.
    """
    return ProcessSettings(
        config.names,
        config.params,
        known,
        list(dict.fromkeys([*plugins, *config.external_plugins])),
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
    logged: list[Logged] = field(default_factory=list)
    """[G] what the function logged; empty if nothing."""


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
        self._guard = start_guard(settings.max_memory_mb)
        if Path(settings.directory).is_dir():
            os.chdir(settings.directory)
        missing = [path for path in settings.plugins if not Path(path).expanduser().is_file()]
        if missing:
            return Failed("error", _missing_plugins(missing, settings.directory))
        try:
            load_plugins(settings.plugins)
            self._rewards = {
                name: Reward(name, settings.params.get(name), settings.known)
                for name in settings.names
            }
            start_helpers()
        except (ValueError, RuntimeError) as error:
            return Failed("error", report_of(error))
        return None

    def score(self, task: Task) -> Values | Failed:
        """Run a task of a function that is not async."""
        call = _Call(task)
        try:
            return call.values(self._rewards[task.name].score(*call.inputs))
        except RewardError as error:
            return _failed(error)

    async def score_async(self, task: Task) -> Values | Failed:
        """Run a task of an async function, for at most its time limit."""
        call = _Call(task)
        scoring = self._rewards[task.name].score_async(*call.inputs)
        try:
            return call.values(await asyncio.wait_for(scoring, task.timeout_s))
        except RewardError as error:
            return _failed(error)
        except TimeoutError:
            return Failed("timeout", "cancelled", splittable=True)


class _Call:
    """One call of a reward function: what it gets, and what it comes to."""

    def __init__(self, task: Task):
        self._name = task.name
        self._log = CallLog(len(task.group.completions))
        columns = reward_columns(task.group, task.state, self._log)
        self.inputs = columns, task.group.prompt.prompt_id
        self._start = time.perf_counter()

    def values(self, values: list[float]) -> Values:
        """The result of a function that returned.

        Raises:
            RewardError: it logged what fits no completion.
        """
        seconds = time.perf_counter() - self._start
        try:
            logged = self._log.per_completion()
        except ValueError as error:
            raise RewardError(f"reward function {self._name!r}: {error}") from None
        return Values(values, seconds, logged if logged and logged[0] != Logged() else [])


def _missing_plugins(paths: Sequence[str], directory: str) -> str:
    """Of files that the driver has and this process has not."""
    where = f"its working directory is {os.getcwd()}"
    if os.getcwd() != directory:
        where += f", as it has no {directory}, that of the run"
    return (
        f"the reward process on host {socket.gethostname()} has no {', '.join(paths)} "
        f"(reward.external_plugins; {where}). Put plugins where every host has them under the same "
        "path, or submit the run as a Ray job with --working-dir and name them relative to it"
    )


def _failed(error: RewardError) -> Failed:
    return Failed("error", report_of(error), splittable=error.__cause__ is not None)


def report_of(error: ValueError | RuntimeError) -> str:
    """The user's own traceback, if there is one, and the message of `error` below it."""
    cause = error.__cause__
    if cause is None or cause.__traceback__ is None:
        return str(error)
    frames: TracebackType | None = cause.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in _OWN_FILES:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(cause), cause, frames)) + f"\n{error}"


def kill_group(pid: int) -> None:
    """Kill a reward process, which leads a group, and what it started."""
    with contextlib.suppress(ProcessLookupError):  # it ended before; its guard sees to the rest
        os.killpg(pid, signal.SIGKILL)
