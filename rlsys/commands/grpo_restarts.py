"""`max_restarts`: a parent of the driver, which starts it again after a crash or a lost node.

It holds no model and no connection to Ray, so what ends a driver does not end it. The exit code of
the driver decides: a user's mistake, a user's stop, a preemption, a full disk and a run that is
stopped for its health end both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rlsys import attempts, exit_codes
from rlsys.config import RunConfig
from rlsys.files import read_jsonl
from rlsys.interrupts import STOP_SIGNALS, Stopped
from rlsys.run.checkpoints import checkpoint_steps
from rlsys.run.folder import RunDir
from rlsys.text import counted

LAST = (
    *(exit_codes.DONE, exit_codes.WRONG_INPUT, exit_codes.UNHEALTHY),
    *(exit_codes.DISK_FULL, exit_codes.PREEMPTED),
    *map(exit_codes.of_signal, (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)),
)
"""Exit codes after which the driver is not started again."""
DRIVER = (sys.executable, "-m", "rlsys.cli")
LONGEST_DELAY_S = 60.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt ended."""

    reason: str
    """The last line of its error, or the signal that killed it."""
    step: int
    """The last step that was recorded."""

    def __str__(self) -> str:
        return f"{self.reason} (after step {self.step})"


def run_attempts(config: RunConfig, path: str, words: Sequence[str]) -> int:
    """Run the driver of a checked config until it is done or may not be started again.

    Args:
        config: what `path` and `words` mean.
        path: the config's file.
        words: of the command line behind it.

    Returns:
        The exit code of the last attempt.
    """
    return _Supervisor(config, [config.command, path, *words]).run()


class _Supervisor:
    def __init__(self, config: RunConfig, words: Sequence[str]):
        self._config = config
        self._words = words
        self._run = RunDir(Path(config.output_dir))
        self._stop: int | None = None
        """The first stop signal."""
        self._driver: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Start the driver again and again; returns the last exit code."""
        for stop in STOP_SIGNALS:
            if signal.getsignal(stop) != signal.SIG_IGN:
                signal.signal(stop, self._pass_on)
        failure: Failure | None = None
        began = False
        for number in range(1, self._config.max_restarts + 2):
            config, ended = _mark(self._run.config), _mark(self._run.ended)
            code = self._attempt(number, continues=began)
            if self._stop is not None or code in LAST:
                return code
            # Until a driver has written its config, the folder may hold another run.
            began = began or config != _mark(self._run.config)
            before = failure
            failure = self._failure(code, has_said=ended != _mark(self._run.ended))
            if failure == before:
                _say(f"not started again: it failed in the same place twice: {failure}")
                return code
            if number <= self._config.max_restarts and not self._wait(number, failure, began):
                assert self._stop is not None
                return exit_codes.of_signal(self._stop)
        limit = counted(self._config.max_restarts, "restart")
        _say(f"not started again: max_restarts allows {limit}. The last failure: {failure}")
        return code

    def _attempt(self, number: int, *, continues: bool) -> int:
        """Run the driver once; returns its exit code, as a shell shows it."""
        environment = {**os.environ, attempts.NUMBER: str(number)}
        if continues:
            environment[attempts.CONTINUES] = "1"
        command = [*DRIVER, *self._words]
        # In this process group: a terminal and Ray send signals to the group, SIGKILL among them.
        self._driver = subprocess.Popen(command, env=environment)
        if self._stop is not None:  # it came before there was a driver
            self._driver.send_signal(self._stop)
        code = self._driver.wait()
        return 128 - code if code < 0 else code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Give a signal to the driver, for which two within a second are one."""
        self._stop = number if self._stop is None else self._stop
        if self._driver is not None:
            self._driver.send_signal(number)  # which does nothing if it has ended

    def _failure(self, code: int, *, has_said: bool) -> Failure:
        end = self._run.read_end() if has_said else None
        if end is not None:
            reason = end[1]
        elif code > 128:
            reason = f"the driver was killed by {signal.Signals(code - 128).name}"
        else:
            reason = f"the driver ended with exit code {code}"
        rows = read_jsonl(self._run.metrics) if self._run.metrics.exists() else ()
        steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
        return Failure(reason, max(steps, default=0))

    def _wait(self, number: int, failure: Failure, began: bool) -> bool:
        """Say what follows, and wait; False if a stop signal came."""
        delay_s = min(self._config.recovery.backoff_s * 2 ** (number - 1), LONGEST_DELAY_S)
        saved = checkpoint_steps(self._run.checkpoints) if began else []
        start = f"from {self._run.checkpoints / f'step-{saved[-1]}'}" if saved else "from its start"
        _say(
            f"restart {number} of {self._config.max_restarts}, {start}, in {delay_s:g} s: {failure}"
        )
        until = time.monotonic() + delay_s
        while self._stop is None and time.monotonic() < until:
            time.sleep(POLL_S)
        if self._stop is not None:
            _say(str(Stopped(self._stop)))
        return self._stop is None


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _say(line: str) -> None:
    print(f"\nrlsys: {line}", file=sys.stderr, flush=True)
