"""What actors print, on all nodes: Ray brings the lines to the driver, which writes them down."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray._private import ray_constants
from ray._private.ray_logging import global_worker_stdstream_dispatcher

from rlsys.log_files import NAME, LogFile
from rlsys.redact import HIDDEN, is_secret, without_password

_HANDLER = "rlsys logs"
_OTHERS = "other-0"
"""Where lines of processes go that are not actors of a role."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
SHORTEST_SECRET = 6
"""Shorter values are in texts by chance."""


def name_lines(name: str) -> None:
    """Have Ray attribute what this process prints from now on to `name`, as `policy-0`.

    Ray would name the class alone, and only that before a constructor has ended.
    """
    for descriptor in (1, 2):
        os.write(descriptor, f"{ray_constants.LOG_PREFIX_ACTOR_NAME}{name}\n".encode())


@contextmanager
def kept_logs(folder: Path, secrets: Sequence[str], say: Callable[[str], object]) -> Iterator[None]:
    """Append what actors print to `folder`, until the `with` block ends.

    Args:
        folder: gets ROLE-RANK.log.
        secrets: texts that are left out, besides the values of secret environment variables.
        say: prints a line.
    """
    logs = _Logs(folder, secrets, say)
    global_worker_stdstream_dispatcher.add_handler(_HANDLER, logs.take)
    try:
        yield
    finally:
        global_worker_stdstream_dispatcher.remove_handler(_HANDLER)
        logs.close()


class _Logs:
    def __init__(self, folder: Path, secrets: Sequence[str], say: Callable[[str], object]):
        self._folder, self._say = folder, say
        values = {value for name, value in os.environ.items() if is_secret(name)} | {*secrets}
        long = sorted((v for v in values if len(v) >= SHORTEST_SECRET), key=len, reverse=True)
        self._secret = re.compile("|".join(map(re.escape, long))) if long else None
        self._files: dict[str, LogFile] = {}
        self._processes: dict[str, tuple[object, object]] = {}
        """Name -> address and id of the process that printed last."""
        self._is_failing = False

    def take(self, batch: dict[str, Any]) -> None:
        """Write a batch of lines; Ray calls it in its own thread, which must not end."""
        if batch.get("pid") == "autoscaler":  # a table every few seconds, which Ray prints nowhere
            return
        found = NAME.match(batch.get("actor_name") or "")
        name = found[0] if found else _OTHERS
        lines = [self._shown(str(line)) for line in batch["lines"]]
        process = (batch.get("ip"), batch.get("pid"))
        if self._processes.get(name) != process:
            self._processes[name] = process
            lines.insert(0, f"--- process {process[1]} on {process[0]}")
        try:
            self._files.setdefault(name, LogFile(self._folder / f"{name}.log")).write(lines)
        except OSError as error:
            if not self._is_failing:
                self._is_failing = True
                self._say(f"note: logs of actors cannot be written and are lost: {error}")
        else:
            self._is_failing = False

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _shown(self, line: str) -> str:
        line = without_password(_COLOURS.sub("", line))
        return line if self._secret is None else self._secret.sub(HIDDEN, line)
