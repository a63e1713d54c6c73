"""Commands run between steps, and errors reach their callers."""

from __future__ import annotations

from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event

import pytest

from rlsys.engines.loop import EngineLoop
from rlsys.types import Prompt, RolloutGroup, SampleRequest

PATIENCE_S = 60.0
PROMPT = Prompt("p", [], [1])


class Engine:
    """Finishes a group after as many steps as its number says; a step waits for its token."""

    def __init__(self):
        self.tokens = SimpleQueue()
        self.left = {}
        self.paused = False
        self.log = []

    @property
    def has_work(self):
        return bool(self.left) and not self.paused

    def add(self, requests):
        if any(request.ticket == 0 for request in requests):
            raise ValueError("no such prompt")
        self.left |= {request.ticket: request.ticket for request in requests}

    def step(self):
        token = self.tokens.get(timeout=PATIENCE_S)
        if token == "broken":
            raise RuntimeError("out of memory")
        self.log.append(token)
        self.left = {ticket: left - 1 for ticket, left in self.left.items()}
        finished = [ticket for ticket, left in self.left.items() if left == 0]
        self.abort(finished)
        return [RolloutGroup(ticket, PROMPT, []) for ticket in finished]

    def abort(self, tickets):
        for ticket in tickets:
            del self.left[ticket]

    def pause(self, paused):
        self.paused = paused
        self.log.append("pause" if paused else "go on")
        return sorted(self.left)


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def loop(engine):
    loop = EngineLoop(lambda: engine)
    yield loop
    loop.close()


def sample(loop, *tickets):
    """The queue of what becomes of the groups."""
    ends = SimpleQueue()
    loop.sample([SampleRequest(i, PROMPT, 1, 1.0, None) for i in tickets], ends.put)
    return ends


def next_end(ends):
    return ends.get(timeout=PATIENCE_S)


def test_groups_arrive_when_they_are_finished(loop, engine):
    ends = sample(loop, 2, 1)
    engine.tokens.put("a")
    assert next_end(ends).ticket == 1
    engine.tokens.put("b")
    assert next_end(ends).ticket == 2


def test_a_command_waits_for_one_step_and_not_for_a_completion(loop, engine):
    ends = sample(loop, 3)
    engine.tokens.put("a")
    engine.tokens.put("b")
    paused = loop.call(lambda engine: engine.pause(True))
    more = sample(loop, 1)
    assert paused.result(PATIENCE_S) == [3]
    assert "c" not in engine.log
    engine.tokens.put("c")
    assert loop.call(lambda engine: engine.pause(True)).result(PATIENCE_S) == [1, 3]
    assert "c" not in engine.log  # a paused engine takes no step
    loop.call(lambda engine: engine.pause(False))
    assert next_end(more).ticket == 1
    engine.tokens.put("d")
    engine.tokens.put("e")
    assert next_end(ends).ticket == 3


def test_groups_that_are_given_up_end_with_none(loop, engine):
    ends = sample(loop, 5, 1)
    given_up = loop.abort([5, 77])
    engine.tokens.put("a")
    outcomes = [next_end(ends), next_end(ends)]
    given_up.result(PATIENCE_S)
    assert None in outcomes
    assert [group.ticket for group in outcomes if group is not None] == [1]


def test_the_error_of_a_step_reaches_every_group_and_the_loop_continues(loop, engine):
    ends = sample(loop, 1, 2)
    engine.tokens.put("broken")
    for _ in range(2):
        error = next_end(ends)
        assert isinstance(error, RuntimeError)
        assert str(error) == "out of memory"
    ends = sample(loop, 1)
    engine.tokens.put("a")
    assert next_end(ends).ticket == 1


def test_a_broken_engine_raises_its_error_in_every_call(loop, engine, monkeypatch):
    def abort(tickets):
        raise RuntimeError("out of memory again")

    monkeypatch.setattr(engine, "abort", abort)
    ends = sample(loop, 1)
    engine.tokens.put("broken")
    assert str(next_end(ends)) == "out of memory"
    assert str(next_end(sample(loop, 3))) == "out of memory"
    for asked in (loop.call(lambda engine: engine.pause(True)), loop.abort([1])):
        with pytest.raises(RuntimeError, match=r"^out of memory$"):
            asked.result(PATIENCE_S)


def test_a_cancelled_command_is_skipped(loop, engine):
    ends = sample(loop, 1)  # whose step waits for its token
    cancelled = loop.call(lambda engine: engine.pause(True))
    assert cancelled.cancel()
    engine.tokens.put("a")
    assert next_end(ends).ticket == 1
    assert loop.call(lambda engine: engine.pause(False)).result(PATIENCE_S) == []
    assert "pause" not in engine.log


def test_only_refused_requests_end_with_the_error(loop, engine):
    good, bad = sample(loop, 1), sample(loop, 0, 4)
    assert [str(next_end(bad)) for _ in range(2)] == ["no such prompt"] * 2
    engine.tokens.put("a")
    assert next_end(good).ticket == 1


def test_the_error_of_a_command_is_raised_with_its_result(loop):
    failing: Future = loop.call(lambda engine: engine.abort([9]))
    with pytest.raises(KeyError):
        failing.result(PATIENCE_S)
    assert loop.call(lambda engine: engine.pause(True)).result(PATIENCE_S) == []


def test_whoever_waits_for_an_engine_that_cannot_be_built_gets_its_error():
    asked = Event()

    def build():
        asked.wait(PATIENCE_S)
        raise ValueError("no EOS token")

    loop = EngineLoop(build)
    early, ends = loop.call(lambda engine: engine.pause(True)), sample(loop, 1)
    asked.set()
    late = loop.call(lambda engine: engine.pause(True))
    for future in (loop.built, early, late):
        with pytest.raises(ValueError, match="no EOS token"):
            future.result(PATIENCE_S)
    assert str(next_end(ends)) == "no EOS token"
    loop.close()


def test_commands_wait_until_the_engine_is_built(engine):
    asked = Event()

    def build():
        asked.wait(PATIENCE_S)
        return engine

    loop = EngineLoop(build)
    early = loop.call(lambda engine: engine.pause(True))
    assert not loop.built.done()
    asked.set()
    assert early.result(PATIENCE_S) == []
    assert loop.built.result(PATIENCE_S) >= 0
    loop.close()
