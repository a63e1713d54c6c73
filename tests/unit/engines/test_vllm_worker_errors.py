"""A worker process's error takes the place of vLLM's "see stack trace for root cause"."""

import errno
import logging
import multiprocessing
import os
import re

import pytest

from rlsys.engines.vllm.worker_errors import leave_errors, raise_worker_errors

WRAPPER = "WorkerProc initialization failed. See stack trace for root cause."


def log_exception(message):
    try:
        raise ValueError(message)
    except ValueError:
        logging.getLogger("vllm.v1.executor").exception("WorkerProc failed to start.")


def fail(*messages):
    """What a worker of vLLM does: log exceptions, the last of which ends it."""
    leave_errors()
    logging.getLogger("vllm.v1.executor").error("no exception")
    for message in messages:
        log_exception(message)


@pytest.fixture
def vllm_logger():
    """Has the handlers from before again, afterwards."""
    logger = logging.getLogger("vllm")
    before = list(logger.handlers)
    yield logger
    logger.handlers[:] = before


def start(*workers, error=WRAPPER):
    """Start processes that log these messages, one after the other; then raise as vLLM does."""
    context = multiprocessing.get_context("spawn")
    with raise_worker_errors():
        for rank, messages in enumerate(workers):
            process = context.Process(target=fail, args=messages, name=f"VllmWorker-{rank}")
            process.start()
            process.join()
            assert process.exitcode == 0
        raise TypeError(error)


def test_the_last_error_of_the_worker_that_failed_first_is_raised():
    with pytest.raises(RuntimeError, match=r"^in VllmWorker-1:\nTraceback") as caught:
        start([], ["something optional is missing", "the file\nis damaged"], ["connection lost"])
    assert str(caught.value).endswith("ValueError: the file\nis damaged")
    assert isinstance(caught.value.__cause__, TypeError)


def test_vllms_own_error_is_raised_if_no_worker_left_one():
    with pytest.raises(TypeError, match=re.escape(WRAPPER)):
        start([])


def test_an_error_of_the_engine_is_not_replaced_by_a_workers():
    with pytest.raises(TypeError, match="no room for a KV cache"):
        start(["something optional is missing"], error="no room for a KV cache")


@raise_worker_errors()
def start_here(message):
    """Log and raise, like an engine without worker processes."""
    log_exception(message)
    raise TypeError(WRAPPER)


def test_errors_logged_in_the_engines_process_are_not_a_workers(vllm_logger):
    leave_errors()
    with pytest.raises(TypeError, match=re.escape(WRAPPER)):
        start_here("something optional is missing")


@pytest.mark.parametrize("exc_info", [True, False])
def test_a_record_without_an_exception_is_ignored(vllm_logger, exc_info):
    leave_errors()
    with raise_worker_errors():
        vllm_logger.error("no exception", exc_info=exc_info)
        assert os.listdir(os.environ["RLSYS_VLLM_WORKER_ERRORS"]) == []


def test_a_worker_that_cannot_write_its_error_continues(vllm_logger, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    leave_errors()
    with raise_worker_errors():
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.write_text", full)
            log_exception("something is missing")
        assert "No space left on device" in capsys.readouterr().err


def test_errors_after_the_start_are_not_written(vllm_logger):
    leave_errors()
    with raise_worker_errors():
        pass
    log_exception("later")  # finds no folder, and raises nothing
    assert "RLSYS_VLLM_WORKER_ERRORS" not in os.environ
