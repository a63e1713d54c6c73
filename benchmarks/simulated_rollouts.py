"""Rollouts in a time of their own: rlsys's scheduling, engines that only count tokens.

`run_steps` runs the steps of rlsys.rollout.Rollouts, whose clock is a `World`. Its engines have the
protocol SamplingEngine of rlsys/engines/loop.py: every sequence that runs gets a token in each
decode step, which takes as long as the number of running sequences says.
"""

import heapq
import math

from rlsys.data.streams.in_memory import InMemory
from rlsys.rollout.clock import Clock
from rlsys.rollout.rollouts import Rollouts
from rlsys.tracking.base import Tracker
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup

NEVER = math.inf


class LengthEngine:
    """A SamplingEngine whose completions have given lengths.

    Args:
        lengths: (prompt, attempt) -> tokens of each completion.
        step_seconds: running sequences -> seconds of a decode step.
        max_num_seqs: sequences that run at once; the others wait in their order.
    """

    def __init__(self, lengths, step_seconds, max_num_seqs):
        self._lengths, self._step_seconds, self._most = lengths, step_seconds, max_num_seqs
        self.now = 0.0
        self.version = 0
        self.sequence_seconds = 0.0
        """Seconds of all running sequences together."""
        self._steps = 0.0
        """Decode steps so far, with a fraction where a step was looked at in its middle."""
        self._running = []  # a heap of (step at which it ends, ticket, tokens)
        self._waiting = []
        self._groups = {}  # ticket -> (request, version, lengths of what has ended)
        self._attempts = {}

    @property
    def has_work(self):
        return bool(self._groups)

    @property
    def num_groups(self):
        return len(self._groups)

    def add(self, requests):
        for request in requests:
            name = request.prompt.prompt_id
            attempt = self._attempts[name] = self._attempts.get(name, -1) + 1
            self._groups[request.ticket] = request, self.version, []
            tokens = self._lengths(name, attempt, request.num_generations)
            self._waiting += [(request.ticket, number) for number in tokens]
        self._fill()

    def abort(self, tickets):
        for ticket in tickets:
            self._groups.pop(ticket, None)
        self._waiting = [one for one in self._waiting if one[0] in self._groups]
        self._running = [one for one in self._running if one[1] in self._groups]
        heapq.heapify(self._running)
        self._fill()

    def next_end(self):
        """When the next sequence ends."""
        if not self._running:
            return NEVER
        return self.now + (self._running[0][0] - self._steps) * self._seconds_of_step()

    def run_until(self, moment):
        """Step up to a moment; returns the groups that this finished."""
        finished = []
        while self._running and self.next_end() <= moment:
            finished += self.step()
        self._pass(moment - self.now)
        return finished

    def step(self):
        """Step until a sequence ends; returns the groups that this finished."""
        self._pass(self.next_end() - self.now)
        _, ticket, tokens = heapq.heappop(self._running)
        self._fill()
        request, version, ended = self._groups[ticket]
        ended.append(tokens)
        if len(ended) < request.num_generations:
            return []
        del self._groups[ticket]
        return [group_of(request, version, ended)]

    def _pass(self, seconds):
        if self._running:
            self._steps += seconds / self._seconds_of_step()
            self.sequence_seconds += seconds * len(self._running)
        self.now += seconds

    def _fill(self):
        room = self._most - len(self._running)
        starting, self._waiting = self._waiting[:room], self._waiting[room:]
        for ticket, tokens in starting:
            heapq.heappush(self._running, (self._steps + tokens, ticket, tokens))

    def _seconds_of_step(self):
        return self._step_seconds(len(self._running))


def group_of(request, version, lengths):
    completions = [
        Completion([0] * number, [0.0] * number, "", "stop", policy_versions=(version,))
        for number in lengths
    ]
    return RolloutGroup(request.ticket, request.prompt, completions)


class World(Clock):
    """A clock that runs while somebody waits, engines, and rewards that take no time.

    It is what Rollouts knows as RolloutActors, too: requests go to the engine with the fewest
    groups.
    """

    def __init__(self, make_engine, num_engines):
        self.now = 0.0
        self.engines = [make_engine() for _ in range(num_engines)]
        self._until = NEVER
        self._background = None
        self._finished = []

    # --- RolloutActors

    def submit(self, requests):
        for request in requests:
            min(self.engines, key=lambda engine: engine.num_groups).add([request])

    def abort(self, tickets):
        for engine in self.engines:
            engine.abort(tickets)
        self._finished = [one for one in self._finished if one.ticket not in tickets]

    @property
    def num_pending(self):
        return sum(engine.num_groups for engine in self.engines) + len(self._finished)

    def bring_back(self):
        return False

    def pending_refs(self):
        return [self.now] if self._finished else [engine.next_end() for engine in self.engines]

    def collect(self):
        finished, self._finished = self._finished, []
        return finished

    def publish(self, version):
        for engine in self.engines:
            engine.version = version

    @property
    def sequence_seconds(self):
        """Seconds of all sequences that ran, together."""
        return sum(engine.sequence_seconds for engine in self.engines)

    # --- Clock

    def monotonic(self):
        return self.now

    def wait(self, refs, *, timeout_s):
        moment = max(self.now, min([self.now + timeout_s, self._until, *refs]))
        for engine in self.engines:
            self._finished += engine.run_until(moment)
        self.now = moment

    def start(self, work):
        """The background works while `pass_seconds` lets time pass."""
        self._background = lambda: work(lambda: self.now >= self._until)
        return self._stop

    def _stop(self):
        self._background = None

    def pass_seconds(self, seconds):
        """The driver is busy with something else; engines go on."""
        self._until = self.now + seconds
        if self._background is not None:
            self._background()
        self.wait([], timeout_s=self._until - self.now)
        self._until = NEVER


class InstantRewards:
    """RewardWorkers that score at once; no two completions of a group are equally good."""

    def __init__(self):
        self._scored = []

    num_pending = property(lambda self: len(self._scored))

    def submit(self, group):
        rewards = [
            RewardOutput(float(i), {"format": float(i)}) for i in range(len(group.completions))
        ]
        self._scored.append(
            RolloutGroup(group.ticket, group.prompt, group.completions, rewards, group.group_id)
        )

    def forget(self, tickets):
        self._scored = [group for group in self._scored if group.ticket not in tickets]

    def pending_refs(self):
        return [0.0] if self._scored else []  # ready since the beginning of time

    def collect(self):
        scored, self._scored = self._scored, []
        return scored


class NoTracker(Tracker):
    def log_metrics(self, step, metrics):
        pass

    def log_completions(self, step, group, advantages, split="train"):
        pass

    def close(self):
        pass


def make_rollouts(config, world):
    prompts = [Prompt(f"p{i}", [], [1]) for i in range(config.num_prompts * (config.num_steps + 8))]
    return Rollouts(
        config,
        engines=world,
        rewards=InstantRewards(),
        prompts=InMemory(prompts, shuffle=False, seed=0),
        held_out={},
        tracker=NoTracker(),
        clock=world,
    )


def run_steps(config, world, update_seconds):
    """A row for each step: its seconds, lengths and metrics.

    Args:
        world: engines and time, a World or another that has its methods.
        update_seconds: tokens of a batch -> seconds from the batch to the next weights.
    """
    found, rows = make_rollouts(config, world), []
    for step in range(1, config.num_steps + 1):
        start, before = world.now, world.sequence_seconds
        groups = found.next_batch(step)
        lengths = [len(one.token_ids) for group in groups for one in group.completions]
        world.pass_seconds(update_seconds(sum(lengths)))
        world.publish(step)
        row = {"seconds": world.now - start, "lengths": lengths}
        row["sequence_seconds"] = world.sequence_seconds - before
        rows.append(row | found.metrics())
    found.close()
    return rows
