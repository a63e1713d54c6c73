"""The error of a vLLM worker process, raised in the process that started it.

An engine on several GPUs has a worker process for each. If one fails while it starts, vLLM (0.26
and 0.32) logs the error there, and raises in the engine's process "WorkerProc initialization failed
due to an exception in a background process. See stack trace for root cause." So a handler of vLLM's
logger in the workers writes logged exceptions to a folder that the engine's process reads.
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
"""Part of vLLM's own error, see above."""
_FOLDER = "RLSYS_VLLM_WORKER_ERRORS"
"""Environment variable that workers inherit: the folder for their errors."""


@contextmanager
def raise_worker_errors() -> Iterator[None]:
    """Start an engine within this context, to raise a worker's error instead of vLLM's own.

    Raises:
        RuntimeError: a worker's traceback, which ends with its error; vLLM's error if no worker
            left one.
    """
    # A worker that is being killed may still write.
    with TemporaryDirectory(prefix="rlsys-vllm-", ignore_cleanup_errors=True) as folder:
        os.environ[_FOLDER] = folder
        try:
            yield
        except Exception as error:
            # Any other error is the engine's own: workers also log errors that did not end them.
            cause = _first_error(Path(folder)) if _WRAPPER in str(error) else None
            if cause is None:
                raise
            raise RuntimeError(cause) from error
        finally:
            del os.environ[_FOLDER]


def leave_errors() -> None:
    """Write the exceptions that vLLM logs to the folder; called in a worker before it loads."""
    logging.getLogger("vllm").addHandler(_ErrorFile(logging.ERROR))


class _ErrorFile(logging.Handler):
    """Writes the last exception of this process: vLLM survived the others."""

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
        except OSError:  # the disk is full, or the engine is up: the worker continues
            self.handleError(record)


def _first_error(folder: Path) -> str | None:
    """The error of the worker that failed first; the others may only have lost it."""
    texts = [path for path in folder.glob("*.txt") if path.stem != str(os.getpid())]
    return min(texts, key=lambda path: path.stat().st_mtime_ns).read_text() if texts else None
