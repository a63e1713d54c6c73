"""The first Ctrl-C interrupts between two steps, the second one at once."""

import os
import signal

import pytest

from rlsys import interrupts
from rlsys.exit_codes import of_error
from rlsys.interrupts import (
    ImpatientInterrupt,
    Stopped,
    held_back,
    interruptible,
    seconds_given,
    seconds_to_save,
)


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(interrupts, "time", Clock())
    return interrupts.time


def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", interrupts.STOP_SIGNALS)
def test_every_stop_signal_interrupts(number):
    with pytest.raises(KeyboardInterrupt), interruptible():
        send(number)


def test_an_update_is_finished_first(capfd):
    done = []

    def step():
        with held_back():
            send()
            done.append("the rest of the update")
        done.append("never")

    with interruptible(), pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["the rest of the update"]
    assert "this step is finished first" in capfd.readouterr().err


def test_a_closed_terminal_does_not_fail_the_update(capfd):
    reader, writer = os.pipe()
    os.close(reader)
    done = []

    def step():
        with held_back():
            os.dup2(writer, 2)  # what is written there from now on is an error
            send(signal.SIGHUP)
            done.append("the rest of the update")

    stderr = os.dup(2)
    try:
        with interruptible(), pytest.raises(KeyboardInterrupt):
            step()
    finally:
        os.dup2(stderr, 2)
        for descriptor in (stderr, writer):
            os.close(descriptor)
    assert done == ["the rest of the update"]


def test_what_is_finished_first_is_named(capfd):
    with interruptible(), pytest.raises(KeyboardInterrupt), held_back("the model is saved"):
        send()
    assert "interrupted: the model is saved first" in capfd.readouterr().err


def test_an_interruption_between_updates_is_heard_at_once():
    with interruptible():
        with held_back():
            pass
        with pytest.raises(KeyboardInterrupt):
            send()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_one_ends_an_update_at_once(clock, number):

    def update():
        with held_back():
            send()
            clock.now += 5
            with pytest.raises(ImpatientInterrupt):
                send(number)

    with interruptible(), pytest.raises(KeyboardInterrupt):
        update()


def test_signals_that_come_together_are_one(clock):
    """`timeout` sends SIGTERM to its child, and then to its group."""
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
        clock.now += 0.1
        send(signal.SIGTERM)
        send(signal.SIGHUP)


def test_a_failure_in_an_update_is_not_hidden_by_an_interruption():

    def update():
        with held_back():
            send()
            raise ZeroDivisionError

    with interruptible(), pytest.raises(ZeroDivisionError):
        update()


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "interrupted by SIGTERM"),
        (signal.SIGHUP, 129, "interrupted by SIGHUP"),
        (signal.SIGUSR1, 75, "preempted by SIGUSR1"),
        (signal.SIGUSR2, 75, "preempted by SIGUSR2"),
    ],
)
def test_each_signal_has_its_words_and_exit_code(number, code, text):
    with pytest.raises(Stopped) as raised, interruptible():
        send(number)
    assert (of_error(raised.value), str(raised.value)) == (code, text)


def test_a_step_that_does_not_end_in_the_given_time_is_given_up():
    def update():
        with held_back():
            send(signal.SIGTERM)
            signal.pause()

    with interruptible(exit_timeout_s=0.01), pytest.raises(ImpatientInterrupt):
        update()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_file_of_a_notice_interrupts_and_says_how_long_there_is(tmp_path):
    notice = tmp_path / "preempted"

    def run():
        with held_back():
            notice.write_text("40\n")
            signal.pause()
            assert 28 < seconds_to_save(600) <= 30

    with (
        pytest.raises(Stopped) as raised,
        interruptible(exit_timeout_s=600, preemption_file=notice),
    ):
        run()
    assert of_error(raised.value) == 75


def test_without_a_signal_the_runs_own_limit_holds():
    with interruptible(exit_timeout_s=10):
        assert seconds_to_save(600) == 600


@pytest.mark.parametrize(
    ("number", "variables", "seconds"),
    [
        (signal.SIGTERM, {}, 600),
        (signal.SIGTERM, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, 3),
        (signal.SIGUSR1, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, 600),
        (
            signal.SIGTERM,
            {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_JOB_STOP_WAIT_TIME_S": "100"},
            100,
        ),
        (
            signal.SIGTERM,
            {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_JOB_STOP_WAIT_TIME_S": "1000"},
            600,
        ),
    ],
)
def test_ray_says_how_long_a_job_has(number, variables, seconds, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert seconds_given(number, 600) == seconds
    assert seconds_given(number, None, 2) == 2


def test_a_plain_interrupt_in_its_place_is_the_signals_again():
    """Ray raises KeyboardInterrupt where a handler raised something while it waited."""

    def wait_as_ray_does():
        try:
            send(signal.SIGUSR1)
        except Stopped:
            raise KeyboardInterrupt from None

    with pytest.raises(Stopped) as raised, interruptible():
        wait_as_ray_does()
    assert of_error(raised.value) == 75
