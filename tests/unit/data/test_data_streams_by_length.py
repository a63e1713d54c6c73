"""Samples in steps of similar length: each once an epoch, and to be continued."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.streams.by_length import ByLength
from rlsys.data.streams.in_memory import InMemory
from rlsys.data.streams.mixed import Mixed
from rlsys.types import Sample

sizes = st.integers(1, 9)


def by_length(number, size, seed=1):
    stream = InMemory(samples(number), shuffle=True, seed=seed)
    return ByLength(stream, num_rows=number, batch_size=size, seed=seed)


def samples(number, name="r"):
    return [
        Sample(f"{name}{i}", np.zeros(n, dtype=np.int32), np.ones(n, dtype=np.bool_))
        for i, n in enumerate(2 + i % 17 for i in range(number))
    ]


def mixed(numbers, weights, size, seed):
    """Datasets of these numbers of samples, mixed by weight and grouped by length."""
    parts = [
        InMemory(samples(number, f"{chr(97 + i)}:"), shuffle=True, seed=seed + i)
        for i, number in enumerate(numbers)
    ]
    mix = Mixed(parts, weights, seed=seed)
    return ByLength(mix, num_rows=sum(numbers), batch_size=size, seed=seed)


def ids(samples):
    return [sample.sample_id for sample in samples]


@given(number=st.integers(1, 300), size=sizes, epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_epochs_have_each_sample_once(number, size, epochs, seed):
    stream = by_length(number, size, seed)
    steps = -(-epochs * number // size)
    found = Counter(name for _ in range(steps) for name in ids(stream.take(size)))
    assert len(found) == number
    assert min(found.values()) >= epochs
    assert found.total() - epochs * number < size  # what the last step has of the next epoch


def test_the_epoch_is_what_was_handed_out():
    stream = by_length(801, 8)
    for step in range(1, 230):
        stream.take(8)
        assert stream.epoch == pytest.approx(8 * step / 801)


def test_steps_have_similar_lengths():
    def spread(stream):
        steps = [[len(s.token_ids) for s in stream.take(8)] for _ in range(100)]
        return sum(max(step) - min(step) for step in steps)

    assert spread(by_length(800, 8)) < spread(by_length(800, 8)._stream) / 5


@given(number=st.integers(1, 300), size=sizes, steps=st.integers(0, 120))
def test_it_continues_from_its_state(number, size, steps):
    stream = by_length(number, size)
    for _ in range(steps):
        stream.take(size)
    other = by_length(number, size)
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for _ in range(30):
        assert ids(other.take(size)) == ids(stream.take(size))
        assert other.epoch == stream.epoch


def test_a_group_that_was_begun_is_finished_in_its_order_with_another_batch_size():
    stream = by_length(100, 4)
    first = ids(stream.take(4 * 9))  # in the middle of the second group
    other = by_length(100, 6)
    other.load_state_dict(stream.state_dict())
    rest = [name for _ in range(11) for name in ids(other.take(6))]
    assert len({*first, *rest}) == 100


@given(
    small=st.integers(1, 30),
    large=st.integers(50, 300),
    weight=st.floats(0.1, 20),
    size=sizes,
    seed=st.integers(0, 99),
)
def test_copies_of_a_sample_are_in_one_step_only_if_there_are_more_than_steps(
    small, large, weight, size, seed
):
    """A small dataset that is repeated has copies of one length, side by side when sorted."""
    stream = mixed([small, large], [weight, 1.0], size, seed)
    for _ in range(5):  # groups of steps that are sorted together
        stream._fill()
        group = ids(stream._group)
        steps = [Counter(group[i : i + size]) for i in range(0, len(group), size)]
        for name, copies in Counter(group).items():
            assert max(step[name] for step in steps) <= -(-copies // len(steps))


def test_the_same_samples_come_as_without_lengths():
    grouped, plain = (mixed([5, 200], [1.0, 1.0], 8, seed=3) for _ in range(2))
    taken = ids(grouped.take(8 * 6))
    assert Counter(taken) == Counter(ids(plain._stream.take(8 * 6)))
    names = [name for name in taken if name.startswith("a:")]
    assert len(names) > 10  # the weights count as before


def test_steps_with_repeated_samples_have_similar_lengths():
    def spread(stream):
        steps = [[len(s.token_ids) for s in stream.take(8)] for _ in range(100)]
        return sum(max(step) - min(step) for step in steps)

    grouped = mixed([40, 800], [1.0, 2.0], 8, seed=1)
    plain = mixed([40, 800], [1.0, 2.0], 8, seed=1)._stream
    assert spread(grouped) < spread(plain) / 2
