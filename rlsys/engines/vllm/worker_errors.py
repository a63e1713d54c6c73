"""The error of a vLLM worker process, raised in the process that started it.

An engine of several GPUs has a process for each. What one of them raises while it starts, vLLM
(0.26 and 0.32 alike) only logs there; the error in the engine's own process is "WorkerProc
initialization failed due to an exception in a background process. See stack trace for root cause."
So a handler of vLLM's logger, in the workers, hands over what is logged with an exception.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_WRAPPER = "WorkerProc initialization failed"
"""In vLLM's own error, see above."""
_FOLDER = "RLSYS_VLLM_WORKER_ERRORS"
"""Environment variable, which workers inherit: where they leave their errors."""


@contextmanager
def worker_errors_told() -> Iterator[None]:
    """Around the start of an engine: what a worker raised is told instead of vLLM's own error.

    Raises:
        RuntimeError: a worker's traceback, which ends with its error. Where no worker left one, it
            is what vLLM raised.
    """
    # A worker that is being killed may still write.
    with TemporaryDirectory(prefix="rlsys-vllm-", ignore_cleanup_errors=True) as folder:
        os.environ[_FOLDER] = folder
        try:
            yield
        except Exception as error:
            # Any other error is the engine's own: workers also log what they went on after.
            told = _first_error(Path(folder)) if _WRAPPER in str(error) else None
            if told is None:
                raise
            raise RuntimeError(told) from error
        finally:
            del os.environ[_FOLDER]


def leave_errors() -> None:
    """In a worker, before its model is loaded: leave what vLLM logs of exceptions from here on."""
    logging.getLogger("vllm").addHandler(_ErrorFile(logging.ERROR))


class _ErrorFile(logging.Handler):
    """Keeps the last exception of this process: vLLM gave up there, and went on after others."""

    def emit(self, record: logging.LogRecord) -> None:
        folder = Path(os.environ.get(_FOLDER, ""))
        # The folder is gone once the engine is up: later errors come through vLLM's calls.
        if _FOLDER not in os.environ or not folder.is_dir():
            return
        if not record.exc_info or record.exc_info[0] is None:
            return
        text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        unfinished = folder / f"{os.getpid()}.unfinished"
        try:
            unfinished.write_text(f"in {record.processName}:\n{text}")
            unfinished.replace(unfinished.with_suffix(".txt"))
        except OSError:  # the disk is full, or the engine is up by now: the worker goes on
            self.handleError(record)


def _first_error(folder: Path) -> str | None:
    """Of the worker that failed first; the others may only have lost touch with it."""
    texts = [path for path in folder.glob("*.txt") if path.stem != str(os.getpid())]
    return min(texts, key=lambda path: path.stat().st_mtime_ns).read_text() if texts else None
