"""The reward process itself: its settings, requests, answers, and the loop that serves them."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from rlsys.config import RewardConfig
from rlsys.plugins.load import load_plugins
from rlsys.rewards.base import TrainerState
from rlsys.rewards.instances import Params, RewardError
from rlsys.rewards.pool.guard import start_guard
from rlsys.rewards.scoring import Reward, Scored
from rlsys.sandbox.bounded import start_helpers
from rlsys.stacks import answer_for_stacks
from rlsys.types import RewardFailure, RolloutGroup

_OWN_FILES = tuple(str(Path(__file__).parents[1] / name) for name in ("scoring.py", "base.py"))
"""Frames of these are rlsys calling the user's code."""


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """What a reward process is started with."""

    functions: Sequence[str]
    """Names of the reward functions that it runs."""
    params: Mapping[str, Params]
    run_values: Params
    """Values of the run for parameters of these names."""
    plugins: Sequence[str]
    """Paths of files."""
    directory: str
    """Working directory of the run, from which paths start. A process on a machine without it stays
    in its own, which in a Ray job is a copy."""
    max_memory_mb: int | None
    """MiB, see `start_guard`."""


def process_settings(
    config: RewardConfig, run_values: Params, plugins: Sequence[str] = ()
) -> ProcessSettings:
    """The settings of a run in the working directory of this process.

    Args:
        config: of the rewards.
        run_values: values of the run for parameters of these names.
        plugins: files to load before the plugins of `config`.
    """
    return ProcessSettings(
        config.names,
        config.params,
        run_values,
        list(dict.fromkeys([*plugins, *config.external_plugins])),
        os.getcwd(),
        config.max_memory_mb,
    )


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What a process is asked: to score some completions of one prompt by one function."""

    function: str
    group: RolloutGroup
    state: TrainerState
    timeout_s: float
    """Async functions are cancelled after it; others are killed from outside."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A request or a start without a result.

    The report is text, because users' exceptions may not be picklable.
    """

    kind: RewardFailure
    """"crashed": the process ended, with all that it was doing."""
    report: str
    """The traceback of the user's own code, then one line that sums it up."""
    splittable: bool = True
    """Whether one of the completions alone may be the reason."""


class RewardRunner:
    """The reward functions of this process."""

    def start(self, settings: ProcessSettings) -> Failed | None:
        """Load the plugins and instantiate the functions."""
        self._guard = start_guard(settings.max_memory_mb)
        if Path(settings.directory).is_dir():
            os.chdir(settings.directory)
        missing = [path for path in settings.plugins if not Path(path).expanduser().is_file()]
        if missing:
            return Failed("error", _missing_plugins(missing, settings.directory))
        try:
            load_plugins(settings.plugins)
            self._rewards = {
                name: Reward(name, settings.params.get(name), settings.run_values)
                for name in settings.functions
            }
            start_helpers()
        except (ValueError, RuntimeError) as error:
            return Failed("error", _report(error))
        return None

    def score(self, request: ScoreRequest) -> Scored | Failed:
        """Call a function that is not async."""
        try:
            return self._rewards[request.function].score(request.group, request.state)
        except RewardError as error:
            return Failed("error", _report(error), splittable=error.__cause__ is not None)

    async def score_async(self, request: ScoreRequest) -> Scored | Failed:
        """Call an async function, for at most its time limit."""
        scoring = self._rewards[request.function].score_async(request.group, request.state)
        try:
            return await asyncio.wait_for(scoring, request.timeout_s)
        except RewardError as error:
            return Failed("error", _report(error), splittable=error.__cause__ is not None)
        except TimeoutError:
            return Failed("timeout", "")


def _missing_plugins(paths: Sequence[str], directory: str) -> str:
    where = f"its working directory is {os.getcwd()}"
    if os.getcwd() != directory:
        where += f", as it has no {directory}, that of the run"
    return (
        f"the reward process on host {socket.gethostname()} has no {', '.join(paths)} "
        f"(reward.external_plugins; {where}). Put plugins where every host has them under the same "
        "path, or submit the run as a Ray job with --working-dir and name them relative to it"
    )


def _report(error: ValueError | RuntimeError) -> str:
    """The user's own traceback, if there is one, and the message of `error` below it."""
    cause = error.__cause__
    if cause is None or cause.__traceback__ is None:
        return str(error)
    frames: TracebackType | None = cause.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in _OWN_FILES:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(cause), cause, frames)) + f"\n{error}"


def serve(fd: int) -> None:
    """Answer requests until the other end of the pipe is gone: the main function of the process."""
    answer_for_stacks()
    pipe = Connection(fd)
    # In a child of user code, or it would hold the pipe open after the death of this process.
    os.register_at_fork(after_in_child=pipe.close)
    number, (settings, concurrent) = pipe.recv()
    runner = RewardRunner()
    pipe.send((number, runner.start(settings)))
    if concurrent:
        asyncio.run(_serve_async(pipe, runner))
        return
    while (message := _next(pipe)) is not None:
        number, request = message
        pipe.send((number, runner.score(request)))


async def _serve_async(pipe: Connection, runner: RewardRunner) -> None:
    """Run requests together."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, ScoreRequest] | None]()

    def read() -> None:
        while (message := _next(pipe)) is not None:
            loop.call_soon_threadsafe(arrived.put_nowait, message)
        loop.call_soon_threadsafe(arrived.put_nowait, None)

    async def answer(number: int, request: ScoreRequest) -> None:
        pipe.send((number, await runner.score_async(request)))

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
