"""When a pool starts processes and hands out tasks: on a clock of its own, without processes."""

from itertools import count

import pytest

from rlsys.config import RewardConfig
from rlsys.rewards import pool as pool_module
from rlsys.rewards.failures import RewardCodeError
from rlsys.rewards.pool import START_TIMEOUT_S, RewardPool
from rlsys.rewards.work import ProcessDied
from rlsys.types import Completion, Prompt, RolloutGroup


class Processes:
    """A backend that does what the test says, and a clock that runs only while a pool waits.

    Args:
        hanging: the processes whose start does not end, counted from 0 as they are started.
    """

    def __init__(self, hanging=()):
        self.hanging = hanging
        self.now = 100.0
        self.numbers = count()
        self.num_started = 0
        self.killed = []
        self.running = {}
        self.outcomes = {}

    def monotonic(self):
        return self.now

    def spawn(self, names, *, concurrent):
        process = self.num_started
        self.num_started += 1
        reference = process, next(self.numbers)
        if process not in self.hanging:
            self.outcomes[reference] = None
        return process, reference

    def score(self, process, task):
        assert process not in self.killed
        reference = process, next(self.numbers)
        self.running[reference] = task
        return reference

    def end(self, reference, outcome):
        """Have a task come to this."""
        del self.running[reference]
        self.outcomes[reference] = outcome

    def die(self, process):
        """End a process with all that it runs."""
        for reference in [r for r in self.running if r[0] == process]:
            self.end(reference, ProcessDied(f"reward process {process} ended"))

    def wait(self, references, timeout_s):
        done = [reference for reference in references if reference in self.outcomes]
        if not done:
            self.now += timeout_s
        return done

    def result(self, reference):
        outcome = self.outcomes.pop(reference)
        if isinstance(outcome, ProcessDied):
            raise outcome
        return outcome

    def kill(self, process):
        self.killed.append(process)
        self.running = {r: task for r, task in self.running.items() if r[0] != process}


@pytest.fixture(scope="module")
def build():
    """`build(backend, reward functions)` -> a pool that lives by the backend's clock."""
    with pytest.MonkeyPatch.context() as patch:

        def build(backend, *names, **options):
            patch.setattr(pool_module, "time", backend)
            return RewardPool(RewardConfig(reward_funcs=list(names), **options), backend)

        yield build


def group_of(*texts, group_id=0):
    prompt = Prompt(f"train:{group_id}", [{"role": "user", "content": "a"}], [1], {})
    completions = [Completion([1], [0.0], text, "stop", (0,)) for text in texts]
    return RolloutGroup(group_id, prompt, completions)


def collect_for(seconds, pool, backend):
    """What is scored in so many seconds in which something is pending."""
    end, scored = backend.now + seconds, []
    while pool.pending_refs() and backend.now < end:
        pool.wait(1.0)
        scored += pool.collect()
    return scored


# --- starts --------------------------------------------------------------------------------------

LANES = [("format", "accuracy"), ("judge",)]
"""Functions that share a process: some are called one at a time, and one is async."""


@pytest.mark.parametrize("hanging", [0, 1, 2])
def test_a_process_that_does_not_start_is_an_error_that_names_its_functions(build, hanging):
    backend = Processes(hanging={hanging})
    names = ", ".join(map(repr, LANES[hanging == 2]))
    with pytest.raises(RewardCodeError, match=rf"did not start within 300 s.*: {names}$"):
        build(backend, *LANES[0], *LANES[1], num_workers=2)
    assert START_TIMEOUT_S <= backend.now - 100.0 <= START_TIMEOUT_S + 2.0
    assert backend.killed == [0, 1, 2]


@pytest.mark.parametrize("names", LANES)
def test_so_is_one_that_takes_the_place_of_another(build, names):
    backend = Processes(hanging={1})
    pool = build(backend, *names)
    pool.submit(group_of("a", "b"))
    backend.die(0)
    listed = ", ".join(map(repr, names))
    with pytest.raises(RewardCodeError, match=rf"did not start within 300 s.*: {listed}$"):
        collect_for(2 * START_TIMEOUT_S, pool, backend)
    assert START_TIMEOUT_S <= backend.now - 100.0 <= START_TIMEOUT_S + 2.0


def test_a_process_that_started_while_nobody_looked_is_as_good_as_others(build):
    backend = Processes()
    pool = build(backend, "format")
    pool.submit(group_of("a", "b"))
    backend.die(0)
    assert pool.collect() == []
    backend.now += 2 * START_TIMEOUT_S
    assert pool.collect() == []
    assert [process for process, _ in backend.running] == [1]
