"""The first Ctrl-C interrupts between two steps, the second one at once."""

import os
import signal

import pytest

from rlsys import interrupts
from rlsys.interrupts import ImpatientInterrupt, held_back, interruptible


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
