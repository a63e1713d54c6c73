"""When a scorer starts processes and hands out jobs: on a clock of its own, without processes."""

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config import RewardConfig
from rlsys.rewards.logged import Logged
from rlsys.rewards.pool import workers
from rlsys.rewards.pool.failures import RewardCodeError
from rlsys.rewards.pool.scorer import GroupScorer
from rlsys.rewards.pool.serve import Failed
from rlsys.rewards.pool.workers import START_TIMEOUT_S
from rlsys.rewards.scoring import Scored
from rlsys.types import Completion, Prompt, RolloutGroup


class Processes:
    """A backend that does what the test says, and a clock that runs only while a scorer waits.

    Args:
        hanging: the processes whose start does not end, counted from 0 as they are started.
    """

    def __init__(self, hanging=()):
        self.hanging = hanging
        self.now = 100.0
        self.numbers = count()
        self.num_started = 0
        self.killed = []
        self.forgotten = set()
        self.running = {}
        self.outcomes = {}

    def monotonic(self):
        return self.now

    def spawn(self, functions, *, concurrent):
        process = self.num_started
        self.num_started += 1
        reference = process, next(self.numbers)
        if process not in self.hanging:
            self.outcomes[reference] = None
        return process, reference

    def score(self, process, request):
        assert process not in self.killed
        assert request.group.prompt.prompt_id not in self.forgotten
        reference = process, next(self.numbers)
        self.running[reference] = request
        return reference

    def end(self, reference, outcome):
        """Have a request come to this."""
        del self.running[reference]
        self.outcomes[reference] = outcome

    def die(self, process):
        """End a process with all that it runs."""
        for reference in [r for r in self.running if r[0] == process]:
            self.end(reference, Failed("crashed", f"reward process {process} ended"))

    def whereabouts(self, process):
        return "File spin.py, line 3 in spin"

    def wait(self, references, timeout_s):
        done = [reference for reference in references if reference in self.outcomes]
        if not done:
            self.now += timeout_s
        return done

    def result(self, reference):
        return self.outcomes.pop(reference)

    def kill(self, process):
        self.killed.append(process)
        self.running = {r: request for r, request in self.running.items() if r[0] != process}


@pytest.fixture(scope="module")
def build():
    """`build(backend, reward functions)` -> a scorer that lives by the backend's clock."""
    with pytest.MonkeyPatch.context() as patch:

        def build(backend, *names, **options):
            patch.setattr(workers, "time", backend)
            scorer = GroupScorer(RewardConfig(reward_funcs=list(names), **options), backend)
            scorer.start()
            return scorer

        yield build


def group_of(*texts, ticket=0, prompt_id="train:0"):
    prompt = Prompt(prompt_id, [{"role": "user", "content": "a"}], [1], {})
    completions = [Completion([1], [0.0], text, "stop", (0,)) for text in texts]
    return RolloutGroup(ticket, prompt, completions)


def collect_for(seconds, scorer, backend):
    """What is scored in so many seconds in which something is pending."""
    end, scored = backend.now + seconds, []
    while scorer.pending_refs() and backend.now < end:
        scorer.wait(1.0)
        scored += scorer.collect()
    return scored


# --- starts --------------------------------------------------------------------------------------

POOLS = [("format", "accuracy"), ("judge",)]
"""Functions that share a process: some are called one at a time, and one is async."""


@pytest.mark.parametrize("hanging", [0, 1, 2])
def test_a_process_that_does_not_start_is_an_error_that_names_its_functions(build, hanging):
    backend = Processes(hanging={hanging})
    names = ", ".join(map(repr, POOLS[hanging == 2]))
    with pytest.raises(RewardCodeError, match=rf"did not start within 300 s.*: {names}$"):
        build(backend, *POOLS[0], *POOLS[1], num_workers=2)
    assert START_TIMEOUT_S <= backend.now - 100.0 <= START_TIMEOUT_S + 2.0
    assert backend.killed == [0, 1, 2]


@pytest.mark.parametrize("names", POOLS)
def test_a_replacement_that_does_not_start_is_an_error_too(build, names):
    backend = Processes(hanging={1})
    scorer = build(backend, *names)
    scorer.submit(group_of("a", "b"))
    backend.die(0)
    listed = ", ".join(map(repr, names))
    with pytest.raises(RewardCodeError, match=rf"did not start within 300 s.*: {listed}$"):
        collect_for(2 * START_TIMEOUT_S, scorer, backend)
    assert START_TIMEOUT_S <= backend.now - 100.0 <= START_TIMEOUT_S + 2.0


def test_a_process_that_started_while_nobody_looked_is_as_good_as_others(build):
    backend = Processes()
    scorer = build(backend, "format")
    scorer.submit(group_of("a", "b"))
    backend.die(0)
    assert scorer.collect() == []
    backend.now += 2 * START_TIMEOUT_S
    assert scorer.collect() == []
    assert [process for process, _ in backend.running] == [1]


# --- groups that nobody wants any more -----------------------------------------------------------

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "forget", "collect", "return", "fail", "die"]),
        st.integers(0, 3),
    ),
    min_size=20,
    max_size=40,
)


def values_of(request):
    values = {"format": len, "judge": lambda text: len(text) + 0.5}[request.function]
    return Scored([values(completion.text) for completion in request.group.completions], 0.1)


@given(ACTIONS, st.integers(1, 2), st.sampled_from(["raise", "zero"]), st.booleans())
def test_groups_that_are_forgotten_matter_to_no_other(build, actions, num_workers, policy, gated):
    """Whenever they are forgotten, and whether what they run returns, fails, dies or hangs.

    A request of a wanted group fails too, where its completions are then tried alone.
    """
    backend = Processes()
    options = {"on_error": policy, "on_timeout": policy, "num_workers": num_workers}
    gate = {"judge": "format >= 2"} if gated else {}
    scorer = build(backend, "format", "judge", gate=gate, **options)
    wanted, prompts = {}, count()

    def is_wanted(request):
        return request.group.prompt.prompt_id not in backend.forgotten

    def collect():
        for group in scorer.collect():
            assert group.prompt == wanted.pop(group.ticket).prompt
            lengths = [len(completion.text) for completion in group.completions]
            judged = [0.0 if gated and length < 2 else length + 0.5 for length in lengths]
            expected = [{"format": f, "judge": j} for f, j in zip(lengths, judged, strict=True)]
            assert [reward.by_name for reward in group.rewards] == expected
            assert all(reward.failures == {} for reward in group.rewards)

    for action, number in actions:
        if action == "submit" and number not in wanted:
            texts = ["a" * (length + 1) for length in range(number % 4)]
            wanted[number] = group_of(*texts, ticket=number, prompt_id=f"train:{next(prompts)}")
            scorer.submit(wanted[number])
        elif action == "forget":
            if number in wanted:
                backend.forgotten.add(wanted.pop(number).prompt.prompt_id)
            scorer.forget([number])
        elif action == "collect":
            collect()
        elif backend.running:
            reference, request = list(backend.running.items())[number % len(backend.running)]
            is_split = policy == "zero" and len(request.group.completions) > 1
            if action == "return" or (is_wanted(request) and not is_split):
                backend.end(reference, values_of(request))
            elif action == "fail":
                backend.end(reference, Failed("error", "told nobody"))
            else:
                backend.die(reference[0])
        assert scorer.num_pending == len(wanted)
    while wanted:
        for reference, request in list(backend.running.items()):
            if is_wanted(request):  # the others hang
                backend.end(reference, values_of(request))
        scorer.wait(1.0)
        collect()
    assert collect_for(1000.0, scorer, backend) == []
    assert scorer.num_pending == len(scorer.pending_refs()) == len(backend.running) == 0


def test_jobs_that_waited_for_a_forgotten_group_are_next(build):
    backend = Processes()
    scorer = build(backend, "format", on_error="raise")
    for i in range(4):
        scorer.submit(group_of("a", ticket=i))
    scorer.forget([0, 2, 3, 77])
    assert scorer.num_pending == 1
    [reference] = backend.running
    backend.end(reference, Failed("error", "of a group that nobody wants", splittable=False))
    assert scorer.collect() == []
    [request] = backend.running.values()
    assert request.group.ticket == 1
    assert backend.killed == []


@pytest.mark.parametrize("end", ["die", "hang"])
@pytest.mark.parametrize("names", POOLS)
def test_a_process_that_ends_in_a_forgotten_group_is_replaced_for_the_others(build, names, end):
    backend = Processes()
    scorer = build(backend, names[0], on_error="raise", on_timeout="raise")
    scorer.submit(group_of("a", "b", ticket=0))
    scorer.submit(group_of("c", "d", ticket=1))
    scorer.forget([0])
    if end == "die":
        backend.die(0)
    else:
        backend.now += 100.0
    assert scorer.collect() == []
    assert backend.killed == [0]
    assert scorer.collect() == []
    [(reference, request)] = backend.running.items()
    assert reference[0] == 1
    backend.end(reference, Scored([1.0, 2.0], 0.1))
    [group] = scorer.collect()
    assert request.group.ticket == group.ticket == 1
    assert [reward.total for reward in group.rewards] == [1.0, 2.0]
    assert scorer.pending_refs() == []


def test_logged_values_stand_with_the_rewards_of_their_completion(build):
    backend = Processes()
    scorer = build(backend, "format", "judge")
    scorer.submit(group_of("a", "b"))
    logged = {
        "format": [Logged({"length": n, "seen": True}, {"acc": 0.5}) for n in (1, 2)],
        "judge": [Logged({"length": "long"}, {"acc": 1.0})] * 2,
    }
    # Whichever comes first, the order of the config decides who keeps a name.
    for reference, request in reversed(list(backend.running.items())):
        backend.end(reference, Scored([1.0, 2.0], 0.1, logged[request.function]))
    [group] = scorer.collect()
    assert [reward.extra for reward in group.rewards] == [
        {"length": n, "seen": True, "judge/length": "long"} for n in (1, 2)
    ]
    assert [reward.metrics for reward in group.rewards] == [{"acc": 0.5, "judge/acc": 1.0}] * 2
