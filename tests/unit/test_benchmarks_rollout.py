"""Simulated rollouts count what real ones would take; the floor of a decode step is its bytes."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest

from rlsys.model.families import FAMILIES
from rlsys.model.families.base import LayerShape
from rlsys.model.shape import ModelShape

REPOSITORY = Path(__file__).parents[2]
OWN = Namespace(num_generations=2, median=100, longest=1000, engines=1, max_num_seqs=64, steps=3)


@pytest.fixture(scope="module")
def long_tail():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        yield importlib.import_module("long_tail")


def by_number(lengths):
    """Prompt pN has completions of the Nth of `lengths`, whatever the attempt."""
    return lambda name, attempt, number: [lengths[int(name[1:]) % len(lengths)]] * number


def test_a_synchronous_step_takes_its_longest_completion_and_then_the_update(long_tail):
    config = long_tail.make_config(OWN, 4, {})
    steps = long_tail.simulate(config, by_number([10, 20, 30, 400]), lambda n: 0.01, lambda n: 2.0)
    assert len(steps) == config.num_steps
    for step in steps:
        assert step["seconds"] == pytest.approx(4.0 + 2.0)
        assert sorted(step["lengths"]) == [10, 10, 20, 20, 30, 30, 400, 400]
        assert step["idle/policy_frac"] == pytest.approx(4 / 6)
        assert step["idle/rollout_frac"] == pytest.approx(2 / 6)
        assert step["sequence_seconds"] == pytest.approx(0.01 * 2 * 460)


def test_a_decode_step_takes_longer_with_more_sequences_and_some_wait(long_tail):
    def seconds(most):
        own = Namespace(**vars(OWN) | {"max_num_seqs": most})
        config = long_tail.make_config(own, 4, {})
        steps = long_tail.simulate(config, by_number([100]), lambda n: 0.001 * n, lambda n: 0.0)
        return steps[-1]["seconds"]

    assert seconds(8) == pytest.approx(100 * 0.008)
    assert seconds(4) == pytest.approx(2 * 100 * 0.004)


def test_running_ahead_hides_the_update_and_oversampling_puts_the_tail_off(long_tail):
    lengths = by_number([100, 100, 100, 1000])

    def rows(setting):
        config = long_tail.make_config(OWN, 4, setting)
        return long_tail.simulate(config, lengths, lambda n: 0.01, lambda n: 5.0)

    def mean(steps):
        measured = steps[long_tail.WARM_UP : -long_tail.COOL_DOWN]
        return sum(step["seconds"] for step in measured) / len(measured)

    assert mean(rows({})) == pytest.approx(10.0 + 5.0)
    ahead = rows({"max_staleness": 2})
    assert mean(ahead) == pytest.approx(5.0, rel=0.2)
    assert all(step["staleness/max"] <= 2 for step in ahead)
    cut = rows({"oversample_prompts": 0.5})
    assert cut[0]["seconds"] == pytest.approx(1.0 + 5.0)
    assert cut[0]["rollout/groups_cut_off"] == 2
    # Prompts that were given up come first in the next step, until nothing shorter is left.
    assert max(step["seconds"] for step in cut) == pytest.approx(10.0 + 5.0)


def test_lengths_have_the_median_and_the_tail_that_were_asked_for(long_tail):
    lengths = long_tail.Lengths(500, 10.0, 10**6, within=0.5)
    drawn = sorted(n for i in range(4000) for n in lengths(f"p{i}", 0, 8))
    assert drawn[len(drawn) // 2] == pytest.approx(500, rel=0.05)
    assert drawn[int(0.999 * len(drawn))] == pytest.approx(5000, rel=0.2)
    assert lengths("p3", 0, 8) == lengths("p3", 0, 8) != lengths("p3", 1, 8)
    assert len(set(long_tail.Lengths(500, 10.0, 10**6, within=0.0)("p3", 0, 8))) == 1
    assert max(long_tail.Lengths(500, 10.0, 600, within=0.5)("p3", 0, 100)) == 600


def test_times_lie_on_lines_through_what_was_measured(long_tail):
    points = {128: 3.0, 512: 9.0, 1024: 17.0}
    assert long_tail.on_lines(points, 512) == 9.0
    assert long_tail.on_lines(points, 320) == 6.0
    assert long_tail.on_lines(points, 1536) == 25.0
    assert long_tail.on_lines(points, 64) == 2.0


@pytest.mark.parametrize(("tied", "quantization"), [(True, None), (False, None), (False, "fp8")])
def test_the_floor_reads_all_weights_but_embeddings_and_all_keys_and_values(
    long_tail, tied, quantization
):
    rollout_floor = importlib.import_module("rollout_floor")
    shape = ModelShape(
        family=FAMILIES["qwen3"],
        vocab_size=400,
        hidden_size=128,
        intermediate_size=384,
        num_layers=3,
        layers=(LayerShape(),) * 3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tied=tied,
        max_position_embeddings=512,
    )
    setting = {} if quantization is None else {"quantization": quantization}
    config = long_tail.make_config(OWN, 4, setting)
    found = rollout_floor.beside_floor(
        config, shape, device="cuda", sequences=10, context=50, step_ms=4.0, bytes_per_s=1e9
    )
    embedding = 400 * 128
    others = shape.num_params - (embedding if tied else 2 * embedding)
    weights = others * (1 if quantization else 2) + 2 * embedding
    keys_and_values = 10 * 50 * 2 * 3 * 2 * 32 * 2
    assert found["floor_ms"] == pytest.approx((weights + keys_and_values) / 1e6)
    assert found["step / floor"] == pytest.approx(4.0 / found["floor_ms"])
    assert found["tokens_per_second"] == pytest.approx(2500)
