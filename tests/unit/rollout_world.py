"""Engines, reward workers and a clock that runs only while somebody waits, for tests of rollouts.

Groups take as long to sample and to score as the world says of their prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tracking_cases import make_config

from rlsys.data.streams.in_memory import InMemory
from rlsys.rollout.clock import Clock
from rlsys.rollout.pipeline import POLL_S
from rlsys.rollout.rollouts import Rollouts
from rlsys.tracking.base import Tracker
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup

NEVER = float("inf")
TIMEOUT_S = 20.0


def number_of(prompt: Prompt) -> int:
    """17 of the prompt "p17"."""
    return int(prompt.prompt_id.removeprefix("p"))


class World(Clock):
    """Everything but the class under test; the clock, too.

    Args:
        sampling: seconds from submitting prompt number n to its group.
        scoring: seconds from there to its rewards.
        flat: whether all rewards of prompt number n are equal.
        one_at_a_time: engines sample one group after the other, and not any number at once.
    """

    def __init__(
        self,
        sampling: Callable[[int], float],
        scoring: Callable[[int], float] = lambda number: 0.0,
        flat: Callable[[int], bool] = lambda number: False,
        *,
        one_at_a_time: bool = False,
    ):
        self.now = 100.0
        self.seconds = {"sampling": sampling, "scoring": scoring}
        self.flat = flat
        self.one_at_a_time = one_at_a_time
        self.version = 0
        self.engines = Engines(self)
        self.rewards = Rewards(self)
        self.tracker = Log(self)
        self.background: Callable[[], None] | None = None
        self.until = NEVER

    def monotonic(self):
        return self.now

    def wait(self, refs, *, timeout_s):
        assert 0 < timeout_s <= POLL_S
        self.now = max(self.now, min([self.now + timeout_s, *refs, self.until]))

    def start(self, work):
        """The background works while `pass_seconds` lets time pass."""
        assert self.background is None
        self.background = lambda: work(lambda: self.now >= self.until)
        return self.stop

    def stop(self):
        self.background = None

    def publish(self, version):
        """Weights change while sequences are in flight."""
        self.version = version
        for _, _, versions in self.engines.sampling.values():
            versions.append(version)

    def pass_seconds(self, seconds):
        """The driver is busy with something else."""
        self.until = self.now + seconds
        if self.background is not None:
            self.background()
        self.now, self.until = self.until, NEVER

    def rollouts(self, folder, *, num_prompts, dataset_size, validation=(), **fields):
        """Rollouts of `num_prompts` prompts per step, two completions each."""
        given = fields.pop("rollout", {})
        rollout = {
            "generation_batch_size": 2 * num_prompts,
            "num_generations": 2,
            "timeout_s": TIMEOUT_S,
            "temperature": 0.7,
        }
        prompts = make_prompts(dataset_size)
        return Rollouts(
            make_config(folder, rollout=rollout | given, **fields),
            engines=self.engines,
            rewards=self.rewards,
            prompts=InMemory(prompts, shuffle=False, seed=0),
            training=prompts[::2],  # as if the others were streamed
            held_out={"": validation} if validation else {},
            tracker=self.tracker,
            clock=self,
        )


def make_prompts(size, first=0):
    return [
        Prompt(f"p{i}", [{"role": "user", "content": "?"}], [1 + i % 7, 3])
        for i in range(first, first + size)
    ]


class Engines:
    def __init__(self, world):
        self.world = world
        self.requests = []
        self.sampling = {}
        self.aborted = []
        self.free_at = 0.0
        self.back_at = 0.0  # until then no engine is left
        self.sampling_again_s = None  # seconds that replaced engines take; None: none is replaced
        self.replaced_after = []

    def submit(self, requests):
        self.requests += requests
        for request in requests:
            assert request.ticket not in self.sampling
            start = max(self.world.now, self.free_at)
            end = start + self.world.seconds["sampling"](number_of(request.prompt))
            if self.world.one_at_a_time:
                self.free_at = end
            self.sampling[request.ticket] = end, request, [self.world.version]

    def abort(self, tickets):
        self.aborted += [i for i in tickets if self.sampling.pop(i, None)]

    @property
    def num_pending(self):
        return len(self.sampling)

    def pending_refs(self):
        return [end for end, _, _ in self.sampling.values()]

    def bring_back(self):
        return self.world.now < self.back_at

    def restart_silent(self, error):
        if self.sampling_again_s is None:
            raise error
        self.replaced_after.append(error)
        end = self.world.now + self.sampling_again_s
        self.sampling = {i: (end, *rest) for i, (_, *rest) in self.sampling.items()}

    def explain_silence(self):
        return "rollout engine 0: its stacks are in stacks.txt\n"

    def collect(self):
        ready = [i for i, (end, _, _) in self.sampling.items() if end <= self.world.now]
        return [self.group(*self.sampling.pop(i)[1:]) for i in ready]

    @staticmethod
    def group(request, versions):
        number = number_of(request.prompt)
        completions = [
            Completion(
                token_ids=[5] * (2 + number % 3 + index),
                rollout_logprobs=[-1.0] * (2 + number % 3 + index),
                text="",
                finish_reason="stop",
                policy_versions=tuple(versions),
                version_starts=tuple(range(len(versions))),
            )
            for index in range(request.num_generations)
        ]
        return RolloutGroup(request.ticket, request.prompt, completions)


class Rewards:
    """Any number of groups at a time."""

    def __init__(self, world):
        self.world = world
        self.scoring = {}

    def submit(self, group):
        assert group.rewards == []
        number = number_of(group.prompt)
        end = self.world.now + self.world.seconds["scoring"](number)
        totals = [0.0 if self.world.flat(number) else index + number / 8 for index in (0, 1)]
        rewards = [RewardOutput(total, {"correct": total}) for total in totals]
        rewards = rewards[: len(group.completions)]
        self.scoring[group.ticket] = end, replace(group, rewards=rewards)

    def forget(self, tickets):
        for ticket in tickets:
            self.scoring.pop(ticket, None)

    @property
    def num_pending(self):
        return len(self.scoring)

    def pending_refs(self):
        return [end for end, _ in self.scoring.values()]

    def collect(self):
        ready = [i for i, (end, _) in self.scoring.items() if end <= self.world.now]
        return [self.scoring.pop(i)[1] for i in ready]


class Log(Tracker):
    def __init__(self, world):
        self.world = world
        self.completions = []
        self.metrics = []

    def log_metrics(self, step, metrics):
        self.metrics.append((step, dict(metrics)))

    def log_completions(self, step, group, advantages, split="train"):
        self.completions.append((self.world.now, step, group, advantages, split))

    def close(self):
        raise AssertionError("trackers are closed by whoever built them")
