"""What a student samples from: the prompts of samples, in steps that the seed chooses."""

from types import SimpleNamespace

import numpy as np
import pytest
from config_cases import write_distill_run

from rlsys.config import DistillConfig
from rlsys.config.load import load_config_as
from rlsys.rollout.student import StudentSamples, prompt_of
from rlsys.types import Completion, RolloutGroup, Sample


def sample(mask, name="train:0"):
    mask = np.array(mask, dtype=bool)
    return Sample(name, np.arange(10, 10 + len(mask), dtype=np.int32), mask)


@pytest.fixture
def config(tmp_path):
    def load(**distill):
        path = write_distill_run(tmp_path, distill=distill)
        return load_config_as(DistillConfig, path).config

    return load


class Engines:
    """Answer each prompt with its length, the last request first."""

    def __init__(self):
        self.requests = []
        self.pending = []

    def submit(self, requests):
        self.requests += requests
        self.pending += requests

    def bring_back(self):
        return False

    def pending_refs(self):
        return []

    def collect(self):
        request = self.pending.pop()
        tokens = [len(request.prompt.token_ids)]
        done = Completion(tokens, [-1.0], "", "stop", (0,))
        return [RolloutGroup(request.ticket, request.prompt, [done])]


CLOCK = SimpleNamespace(monotonic=lambda: 0.0, wait=lambda refs, timeout_s: None)


@pytest.mark.parametrize(
    ("mask", "length"),
    [([0, 0, 1, 1], 2), ([0, 1, 1, 0, 0, 1, 1, 0], 5), ([0, 1], 1), ([0, 0, 1, 0, 1], 4)],
)
def test_the_prompt_is_what_comes_before_the_last_answer(mask, length):
    assert prompt_of(sample(mask)).token_ids == list(range(10, 10 + length))


def test_completions_come_in_the_order_of_their_samples(config):
    engines = Engines()
    student = StudentSamples(config(), engines, CLOCK)
    samples = [sample([0] * n + [1], f"train:{n}") for n in (3, 1, 2)]
    for step in (1, 2):
        groups = student.sample(step, samples)
        assert [group.prompt.prompt_id for group in groups] == ["train:3", "train:1", "train:2"]
        assert [group.completions[0].token_ids for group in groups] == [[3], [1], [2]]
    assert len({request.ticket for request in engines.requests}) == 6
    assert len({request.seed for request in engines.requests}) == 6
    assert all(request.num_generations == 1 for request in engines.requests)


def test_the_seed_decides_which_steps_the_student_samples(config):
    def steps(lmbda):
        student = StudentSamples(config(lmbda=lmbda), Engines(), CLOCK)
        return [student.has_step(step) for step in range(1, 401)]

    assert all(steps(1.0))
    assert not any(steps(0.0))
    half = steps(0.5)
    assert half == steps(0.5)
    assert 0.4 < sum(half) / 400 < 0.6
    # A larger lmbda adds steps, and takes none away.
    assert all(more or not less for more, less in zip(steps(0.7), half, strict=True))


def test_engines_read_a_config_that_samples_as_the_student_does(config):
    run = config(lmbda=1.0)
    sampler = run.sampler
    assert sampler.longest_row == run.longest_row == 64 + 256
    assert sampler.model.path == run.model.path
    assert not sampler.is_colocated
    assert sampler.rollout.generation_batch_size == run.rows_per_step == 4
    assert config(lmbda=0.0).sampler is None
    assert config(lmbda=0.0).longest_row == 64
